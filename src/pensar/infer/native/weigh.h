// A draw from softmax(x / temperature) by the inverse of its distribution: the first token at which the running sum
// exceeds uniform * total. Two readings of the scores, nothing written: the weights of the block where it falls are
// computed again.
#pragma once

#include "vec.h"

#include <vector>

constexpr int64_t SPAN = 256;  // tokens of a block of sums
constexpr int SIDE = 4;        // vectors side by side

struct Weighed {
    int64_t id;
    float top, total;  // NaN where a score is
};

// Tokens beyond the vocabulary weigh nothing.
INLINE Vf scores_at(const float* x, int64_t first, int64_t vocabulary) {
    if (first + L <= vocabulary) return load<Vf>(x + first);
    float rest[L];
    for (int i = 0; i < L; i++) rest[i] = first + i < vocabulary ? x[first + i] : -INFINITY;
    return load<Vf>(rest);
}

INLINE Vf weights_at(const float* x, int64_t first, int64_t vocabulary, float top, float inverse) {
    return exp((scores_at(x, first, vocabulary) - top) * inverse);
}

// The largest score and the first token that has it.
static Weighed largest(const float* x, int64_t vocabulary) {
    Vf highest[SIDE];
    Vi odd[SIDE] = {};
    for (int v = 0; v < SIDE; v++) highest[v] = splat(-INFINITY);
    for (int64_t i = 0; i < vocabulary; i += SIDE * L)
        UNROLL for (int v = 0; v < SIDE; v++) {
            const Vf scores = scores_at(x, i + v * L, vocabulary);
            highest[v] = max(highest[v], scores);
            odd[v] |= (Vi)(scores != scores);
        }
    const float top = max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
    const Vi all = (odd[0] | odd[1]) | (odd[2] | odd[3]);
    for (int i = 0; i < L; i++)
        if (all[i]) return {0, NAN, NAN};
    for (int64_t i = 0; i < vocabulary; i += L) {
        const Vi same = (Vi)(scores_at(x, i, vocabulary) == splat(top));
        for (int j = 0; j < L; j++)
            if (same[j]) return {i + j, top, 1};
    }
    return {0, top, 1};
}

static Weighed weigh(const float* x, int64_t vocabulary, float temperature, float uniform) {
    thread_local std::vector<double> sums;
    const int64_t blocks = (vocabulary + SPAN - 1) / SPAN;
    sums.resize(blocks);
    const float inverse = 1 / temperature;
    Vf highest[SIDE];
    for (int v = 0; v < SIDE; v++) highest[v] = splat(-INFINITY);
    for (int64_t i = 0; i < vocabulary; i += SIDE * L)
        UNROLL for (int v = 0; v < SIDE; v++) highest[v] = max(highest[v], scores_at(x, i + v * L, vocabulary));
    const float top = max(max(max(highest[0], highest[1]), max(highest[2], highest[3])));
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) {
        Vf block[SIDE] = {};
        for (int64_t i = b * SPAN; i < (b + 1) * SPAN; i += SIDE * L)
            UNROLL for (int v = 0; v < SIDE; v++) block[v] += weights_at(x, i + v * L, vocabulary, top, inverse);
        sums[b] = total += sum((block[0] + block[1]) + (block[2] + block[3]));
    }
    if (!std::isfinite(total)) return {0, NAN, NAN};
    const double wanted = (double)uniform * total;
    int64_t b = 0;
    while (b + 1 < blocks && sums[b] <= wanted) b++;
    double running = b ? sums[b - 1] : 0;
    int64_t id = 0;  // the last with a weight, where rounding keeps the running sum below
    for (int64_t i = b * SPAN; i < (b + 1) * SPAN; i += L) {
        float weights[L];
        store(weights, weights_at(x, i, vocabulary, top, inverse));
        for (int j = 0; j < L; j++) {
            if (weights[j] > 0) id = i + j;
            if ((running += weights[j]) > wanted) return {i + j, top, (float)total};
        }
    }
    return {id, top, (float)total};
}
