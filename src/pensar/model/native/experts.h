// Experts of a layer in training, one after another: SwiGLU of each one's rows, weighted, summed by token; and back.
#pragma once

#include <algorithm>

#include "pairs.h"

struct Experts {
    int64_t tokens, hidden, experts, width, chosen;
    const uint16_t* x;     // [tokens, hidden]
    const float* weights;  // [tokens, chosen]
    const int64_t* order;  // [tokens * chosen], places in `weights`, sorted by expert
    const int64_t* counts; // [experts]
    const float* gate_up;  // [experts, 2 width, hidden]
    const float* down;     // [experts, hidden, width]
    int64_t rows;          // room for gate and up: each expert has as many rows as tokens, rounded up to 8
    uint16_t* room;        // [rows, 2 width]
};

#if PENSAR_PAIRS

// The rows of one expert.
struct Group {
    int64_t expert, count, rows;
    const int64_t* places;
    Half* room;
    const Half* nothing;

    int64_t token(const Experts& e, int64_t r) const { return places[r] / e.chosen; }
    const Half* of(const Half* matrix, const Experts& e, int64_t r) const {
        return r < count ? matrix + token(e, r) * e.hidden : nothing;
    }
};

template <class Work>
static void each_group(const Experts& e, Work work) {
    const int64_t* places = e.order;
    Half* room = e.room;
    const Half* nothing = zeros(e.hidden);
    for (int64_t i = 0; i < e.experts; i++) {
        const Group group{i, e.counts[i], up(e.counts[i], ROWS), places, room, nothing};
        work(group);
        places += group.count;
        room += group.rows * 2 * e.width;
    }
}

// What lies beyond the last expert's rows is zero.
static void clear_rest(const Experts& e) {
    int64_t used = 0;
    for (int64_t i = 0; i < e.experts; i++) used += up(e.counts[i], ROWS);
    std::fill(e.room + used * 2 * e.width, e.room + e.rows * 2 * e.width, 0);
}

static void experts_forward(const Experts& e, float* out) {
    static thread_local Scratch memory[2];
    const int64_t D = e.hidden, I = e.width;
    std::fill(out, out + e.tokens * D, 0.0f);
    clear_rest(e);
    Pair* panels = memory[0].of<Pair>(I * D);
    each_group(e, [&](const Group& g) {
        if (g.count == 0) return;
        const float *gate_up = e.gate_up + g.expert * 2 * I * D, *down = e.down + g.expert * D * I;
        Half* h = memory[1].of<Half>(g.rows * I);
        panels_over_columns([&](int64_t r) { return gate_up + r * D; }, 2 * I, D, panels);
        product(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return g.of(e.x, e, i); }, r); },
            g.rows, panels, D / 2, 2 * I, D / 2,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(g.room + (r + i) * 2 * I + c, tile[i]);
            }
        );
        for (int64_t r = 0; r < g.rows; r++) {
            const Half *gate = g.room + r * 2 * I, *up = gate + I;
            const float weight = r < g.count ? e.weights[g.places[r]] : 0.0f;
            for (int64_t i = 0; i < I; i += L) {
                const Vf x = wide(gate + i);
                store(h + r * I + i, narrow(x / (1.0f + exp(-x)) * wide(up + i) * weight));
            }
        }
        panels_over_columns([&](int64_t r) { return down + r * I; }, D, I, panels);
        product(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return h + i * I; }, r); },
            g.rows, panels, I / 2, D, I / 2,
            [&](int64_t r, int64_t c, const Tile& tile) {
                for (int64_t i = 0; i < ROWS && r + i < g.count; i++) add(out + g.token(e, r + i) * D + c, tile[i]);
            }
        );
    });
}

// Of gate, up, weight and the gradient `dh` of the product after them: what the other products take.
struct Gated {
    Vf h, dgate, dup;
    Gated(Vf gate, Vf up, Vf dh, float weight, Vf& dweight) {
        const Vf sigmoid = 1.0f / (1.0f + exp(-gate)), silu = gate * sigmoid;
        h = silu * up;
        dweight += dh * h;
        h *= weight;
        dh *= weight;
        dup = dh * silu;
        dgate = dh * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
    }
};

static void experts_backward(
    const Experts& e, const uint16_t* grad, float* dx, float* dweights, float* dgate_up, float* ddown
) {
    static thread_local Scratch memory[6];
    const int64_t D = e.hidden, I = e.width;
    std::fill(dx, dx + e.tokens * D, 0.0f);
    each_group(e, [&](const Group& g) {
        const float *gate_up = e.gate_up + g.expert * 2 * I * D, *down = e.down + g.expert * D * I;
        float *to_gate_up = dgate_up + g.expert * 2 * I * D, *to_down = ddown + g.expert * D * I;
        if (g.count == 0) {
            std::fill(to_gate_up, to_gate_up + 2 * I * D, 0.0f);
            std::fill(to_down, to_down + D * I, 0.0f);
            return;
        }
        const int64_t pairs = g.rows / 2;
        Pair* panels = memory[0].of<Pair>(std::max(I, pairs) * D);
        float* dh = memory[1].of<float>(g.rows * I);
        Half* change = memory[2].of<Half>(g.rows * 2 * I);      // of gate and up
        Pair* bundled = memory[3].of<Pair>(pairs * 2 * I);      // the same in pairs of rows
        Pair* h = memory[4].of<Pair>(pairs * I);
        Pair* grads = memory[5].of<Pair>(pairs * D);
        const auto grad_row = [&](int64_t r) { return g.of(grad, e, r); };
        panels_over_rows([&](int64_t r) { return down + r * I; }, D, I, panels);
        product(
            [&](int64_t r) { return left_of_rows(grad_row, r); }, g.rows, panels, D / 2, I, D / 2,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(dh + (r + i) * I + c, tile[i]);
            }
        );
        for (int64_t p = 0; p < pairs; p++) {
            Vf dweight[2] = {};
            float weight[2] = {};
            for (int n = 0; n < 2; n++)
                if (2 * p + n < g.count) weight[n] = e.weights[g.places[2 * p + n]];
            const Half *first = g.room + 2 * p * 2 * I, *second = first + 2 * I;
            for (int64_t i = 0; i < I; i += L) {
                const float* at = dh + 2 * p * I + i;
                const Gated a(wide(first + i), wide(first + I + i), wide(at), weight[0], dweight[0]);
                const Gated b(wide(second + i), wide(second + I + i), wide(at + I), weight[1], dweight[1]);
                store(h + (i / COLUMNS * pairs + p) * COLUMNS + i % COLUMNS, paired(a.h, b.h));
                Half* to = change + 2 * p * 2 * I + i;
                const Vh changed[4] = {narrow(a.dgate), narrow(a.dup), narrow(b.dgate), narrow(b.dup)};
                UNROLL for (int n = 0; n < 4; n++) store(to + n * I, changed[n]);
                bundle(paired(changed[0], changed[2]), bundled + (i / ROWS * pairs + p) * ROWS, pairs);
                bundle(paired(changed[1], changed[3]), bundled + ((I + i) / ROWS * pairs + p) * ROWS, pairs);
            }
            for (int n = 0; n < 2; n++)
                if (2 * p + n < g.count) dweights[g.places[2 * p + n]] = sum(dweight[n]);
        }
        bundles_over_rows(grad_row, g.rows, D, grads);
        product(
            [&](int64_t r) { return left_of_bundle(grads + r * pairs); }, D, h, pairs, I, pairs,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(to_down + (r + i) * I + c, tile[i]);
            }
        );
        panels_over_rows([&](int64_t r) { return g.of(e.x, e, r); }, g.rows, D, panels);
        product(
            [&](int64_t r) { return left_of_bundle(bundled + r * pairs); }, 2 * I, panels, pairs, D, pairs,
            [&](int64_t r, int64_t c, const Tile& tile) {
                UNROLL for (int i = 0; i < ROWS; i++) put(to_gate_up + (r + i) * D + c, tile[i]);
            }
        );
        panels_over_rows([&](int64_t r) { return gate_up + r * D; }, 2 * I, D, panels);
        product(
            [&](int64_t r) { return left_of_rows([&](int64_t i) { return change + i * 2 * I; }, r); },
            g.rows, panels, I, D, I,
            [&](int64_t r, int64_t c, const Tile& tile) {
                for (int64_t i = 0; i < ROWS && r + i < g.count; i++) add(dx + g.token(e, r + i) * D + c, tile[i]);
            }
        );
    });
}

#endif
