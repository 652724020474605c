// Experts of a layer in training, one after another: SwiGLU of each one's rows, weighted, summed by token; and back.
#pragma once

#include <algorithm>

#include "products.h"

struct Experts {
    int64_t tokens, hidden, experts, width, chosen;
    const void* x;         // [tokens, hidden] of T
    const float* weights;  // [tokens, chosen]
    const int64_t* order;  // [tokens * chosen], places in `weights`, sorted by expert
    const int64_t* counts; // [experts]
    const float* gate_up;  // [experts, 2 width, hidden]
    const float* down;     // [experts, hidden, width]
    void* room;            // [tokens * chosen, 2 width] of T: gate and up of every row, in the order of the experts
};

#if PENSAR_FLOATS

// The rows of one expert.
template <class T>
struct Group {
    int64_t expert, count, rows;  // those that there are, and rounded up
    const int64_t* places;
    T* room;
    const T* nothing;

    int64_t token(const Experts& e, int64_t r) const { return places[r] / e.chosen; }
    const T* gate_up(const Experts& e, int64_t r) const { return r < count ? room + r * 2 * e.width : nothing; }
    const T* of(const void* matrix, const Experts& e, int64_t r) const {
        return r < count ? (const T*)matrix + token(e, r) * e.hidden : nothing;
    }
};

template <class T, class Work>
static void each_group(const Experts& e, Work work) {
    const int64_t* places = e.order;
    T* room = (T*)e.room;
    const T* nothing = zeros<T>(std::max(e.hidden, 2 * e.width));
    for (int64_t i = 0; i < e.experts; i++) {
        const Group<T> group{i, e.counts[i], up(e.counts[i], ROWS), places, room, nothing};
        work(group);
        places += group.count;
        room += group.count * 2 * e.width;
    }
}

template <class T>
static void experts_forward(const Experts& e, float* out) {
    static thread_local Scratch memory[2];
    const int64_t D = e.hidden, I = e.width;
    std::fill(out, out + e.tokens * D, 0.0f);
    Word* panels = memory[0].of<Word>(2 * I * D / DEPTH<T>);
    each_group<T>(e, [&](const Group<T>& g) {
        if (g.count == 0) return;
        const float *gate_up = e.gate_up + g.expert * 2 * I * D, *down = e.down + g.expert * D * I;
        T* h = memory[1].of<T>(g.rows * I);
        panels_over_columns<T>([&](int64_t r) { return gate_up + r * D; }, 2 * I, D, panels);
        product<T>(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return g.of(e.x, e, i); }, r); },
            g.rows, panels, D / DEPTH<T>, 2 * I, D / DEPTH<T>,
            [&](int64_t r, int64_t c, const Tile& tile) {
                for (int64_t i = 0; i < ROWS && r + i < g.count; i++) put(g.room + (r + i) * 2 * I + c, tile[i]);
            }
        );
        for (int64_t r = 0; r < g.rows; r++) {
            const T *gate = g.gate_up(e, r), *up = gate + I;
            const float weight = r < g.count ? e.weights[g.places[r]] : 0.0f;
            for (int64_t i = 0; i < I; i += L) {
                const Vf x = wide(gate + i);
                store(h + r * I + i, kept<T>(x / (1.0f + exp(-x)) * wide(up + i) * weight));
            }
        }
        panels_over_columns<T>([&](int64_t r) { return down + r * I; }, D, I, panels);
        product<T>(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return h + i * I; }, r); },
            g.rows, panels, I / DEPTH<T>, D, I / DEPTH<T>,
            [&](int64_t r, int64_t c, const Tile& tile) {
                for (int64_t i = 0; i < ROWS && r + i < g.count; i++) add(out + g.token(e, r + i) * D + c, tile[i]);
            }
        );
    });
}

// Of gate, up, weight and the gradient `dh` of the product after them: what the other products take.
struct Gated {
    Vf h, dgate, dup;

    void of(Vf gate, Vf up, Vf dh, float weight, Vf& dweight) {
        const Vf sigmoid = 1.0f / (1.0f + exp(-gate)), silu = gate * sigmoid;
        h = silu * up;
        dweight += dh * h;
        h *= weight;
        dh *= weight;
        dup = dh * silu;
        dgate = dh * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
    }
};

// `h` in panels, the changes of gate and up in rows and in bundles, and the gradients of the weights.
template <class T>
static void gated(
    const Experts& e, const Group<T>& g, const float* dh, Word* h, T* change, Word* bundled, float* dweights
) {
    constexpr int N = DEPTH<T>;
    const int64_t I = e.width, words = g.rows / N;
    for (int64_t p = 0; p < words; p++) {
        Vf dweight[N] = {};
        float weight[N] = {};
        for (int n = 0; n < N; n++)
            if (N * p + n < g.count) weight[n] = e.weights[g.places[N * p + n]];
        for (int64_t i = 0; i < I; i += L) {
            Kept<T> ready[N], dgate[N], dup[N];
            UNROLL for (int n = 0; n < N; n++) {
                const int64_t r = N * p + n;
                const T* gate = g.gate_up(e, r) + i;
                Gated one;
                one.of(wide(gate), wide(gate + I), wide(dh + r * I + i), weight[n], dweight[n]);
                ready[n] = kept<T>(one.h);
                dgate[n] = kept<T>(one.dgate);
                dup[n] = kept<T>(one.dup);
                store(change + r * 2 * I + i, dgate[n]);
                store(change + r * 2 * I + I + i, dup[n]);
            }
            store(h + (i / COLUMNS * words + p) * COLUMNS + i % COLUMNS, joined(ready));
            bundle(joined(dgate), bundled + (i / ROWS * words + p) * ROWS, words);
            bundle(joined(dup), bundled + ((I + i) / ROWS * words + p) * ROWS, words);
        }
        for (int n = 0; n < N; n++)
            if (N * p + n < g.count) dweights[g.places[N * p + n]] = sum(dweight[n]);
    }
}

template <class T>
static void experts_backward(
    const Experts& e, const void* grad, float* dx, float* dweights, float* dgate_up, float* ddown
) {
    static thread_local Scratch memory[6];
    const int64_t D = e.hidden, I = e.width;
    std::fill(dx, dx + e.tokens * D, 0.0f);
    each_group<T>(e, [&](const Group<T>& g) {
        const float *gate_up = e.gate_up + g.expert * 2 * I * D, *down = e.down + g.expert * D * I;
        float *to_gate_up = dgate_up + g.expert * 2 * I * D, *to_down = ddown + g.expert * D * I;
        if (g.count == 0) {
            std::fill(to_gate_up, to_gate_up + 2 * I * D, 0.0f);
            std::fill(to_down, to_down + D * I, 0.0f);
            return;
        }
        const int64_t words = g.rows / DEPTH<T>;
        Word* panels = memory[0].of<Word>(std::max(2 * I / DEPTH<T>, words) * D);
        float* dh = memory[1].of<float>(g.rows * I);
        T* change = memory[2].of<T>(g.rows * 2 * I);        // of gate and up
        Word* bundled = memory[3].of<Word>(words * 2 * I);  // the same, to be summed over rows
        Word* h = memory[4].of<Word>(words * I);
        Word* grads = memory[5].of<Word>(words * D);
        const auto grad_row = [&](int64_t r) { return g.of(grad, e, r); };
        panels_over_rows<T>([&](int64_t r) { return down + r * I; }, D, I, panels);
        product<T>(
            [&](int64_t r) { return left_of_rows(grad_row, r); },
            g.rows, panels, D / DEPTH<T>, I, D / DEPTH<T>,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(dh + (r + i) * I + c, tile[i]);
            }
        );
        gated<T>(e, g, dh, h, change, bundled, dweights);
        bundles_over_rows<T>(grad_row, g.rows, D, grads);
        product<T>(
            [&](int64_t r) { return left_of_bundle(grads + r * words); }, D, h, words, I, words,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(to_down + (r + i) * I + c, tile[i]);
            }
        );
        panels_over_rows<T>([&](int64_t r) { return g.of(e.x, e, r); }, g.rows, D, panels);
        product<T>(
            [&](int64_t r) { return left_of_bundle(bundled + r * words); }, 2 * I, panels, words, D, words,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(to_gate_up + (r + i) * D + c, tile[i]);
            }
        );
        panels_over_rows<T>([&](int64_t r) { return gate_up + r * D; }, 2 * I, D, panels);
        product<T>(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return change + i * 2 * I; }, r); },
            g.rows, panels, 2 * I / DEPTH<T>, D, 2 * I / DEPTH<T>,
            [&](int64_t r, int64_t c, const Tile& tile) {
                for (int64_t i = 0; i < ROWS && r + i < g.count; i++) add(dx + g.token(e, r + i) * D + c, tile[i]);
            }
        );
    });
}

#endif
