// What training on a CPU computes natively: experts and attention, in float32 or in bfloat16; one thread, one call each.
#include "attention.h"
#include "experts.h"

#if PENSAR_HALVES
#define BOTH(function, ...) (halves ? function<Half>(__VA_ARGS__) : function<float>(__VA_ARGS__))
#elif PENSAR_FLOATS
#define BOTH(function, ...) function<float>(__VA_ARGS__)
#else
#define BOTH(function, ...) (void)0
#endif

extern "C" {

// Whether this processor does so in the type; where it does not, the others do nothing.
int64_t pensar_takes(int64_t halves) {
#if PENSAR_HALVES
    return 1;
#elif PENSAR_FLOATS
    return !halves;
#else
    return 0;
#endif
}

void pensar_experts_forward(int64_t halves, const Experts* e, float* out) { BOTH(experts_forward, *e, out); }

void pensar_experts_backward(
    int64_t halves, const Experts* e, const void* grad, float* dx, float* dweights, float* dgate_up, float* ddown
) {
    BOTH(experts_backward, *e, grad, dx, dweights, dgate_up, ddown);
}

void pensar_attention_forward(int64_t halves, const Attention* a, void* out) { BOTH(attention_forward, *a, out); }

void pensar_attention_backward(
    int64_t halves, const Attention* a, const void* out, const void* grad, float* dq, float* dk, float* dv
) {
    BOTH(attention_backward, *a, out, grad, dq, dk, dv);
}
}
