// What training on a CPU computes natively, where the processor multiplies pairs of bfloat16; one thread, one call each.
#include "attention.h"
#include "experts.h"

#if !PENSAR_PAIRS
static void experts_forward(const Experts&, float*) {}
static void experts_backward(const Experts&, const uint16_t*, float*, float*, float*, float*) {}
static void attention_forward(const Attention&, uint16_t*) {}
static void attention_backward(const Attention&, const uint16_t*, const uint16_t*, float*, float*, float*) {}
#endif

extern "C" {

// Whether this processor can; where it cannot, the others do nothing.
int64_t pensar_pairs() {
#if PENSAR_PAIRS
    return 1;
#else
    return 0;
#endif
}

void pensar_experts_forward(const Experts* e, float* out) { experts_forward(*e, out); }

void pensar_experts_backward(
    const Experts* e, const uint16_t* grad, float* dx, float* dweights, float* dgate_up, float* ddown
) {
    experts_backward(*e, grad, dx, dweights, dgate_up, ddown);
}

void pensar_attention_forward(const Attention* a, uint16_t* out) { attention_forward(*a, out); }

void pensar_attention_backward(
    const Attention* a, const uint16_t* out, const uint16_t* grad, float* dq, float* dk, float* dv
) {
    attention_backward(*a, out, grad, dq, dk, dv);
}
}
