// Causal attention in training: blocks of queries of one head against the keys before them, all of a block's scores
// in the cache (arXiv 2205.14135 without its outer tiles, which a cache of a megabyte does not need).
#pragma once

#include <algorithm>
#include <cmath>

#include "pairs.h"

struct Attention {
    int64_t rows, tokens, heads, kv_heads, size;
    const uint16_t* q;              // [rows, tokens, heads, size]
    const uint16_t *k, *v;          // [rows, tokens, kv_heads, size]
};

#if PENSAR_PAIRS

constexpr int64_t QUERIES = 64;  // of a block

// What belongs to one head of one row of [rows, tokens, heads, size]: a row of numbers for each token, zeros beyond.
struct Head {
    const Half* data;
    int64_t stride, tokens;
    const Half* nothing;
    const Half* operator()(int64_t t) const { return t < tokens ? data + t * stride : nothing; }
};

INLINE Head head_of(const Half* x, const Attention& a, int64_t heads, int64_t row, int64_t head) {
    return {x + (row * a.tokens * heads + head) * a.size, heads * a.size, a.tokens, zeros(a.size)};
}

// A block of queries; keys beyond its last one's, rounded up, are not looked at.
struct Block {
    int64_t first, count, rows, seen;
    Block(int64_t first, int64_t tokens)
        : first(first), count(std::min(QUERIES, tokens - first)), rows(up(count, ROWS)), seen(up(first + count, COLUMNS)) {}
};

// Scores to exp(score - largest), zero where a query must not look; returns one over their sum. Nothing for the rows
// that round a block up.
INLINE float softmax(float* scores, int64_t row, const Block& block) {
    const int64_t known = block.first + row + 1;
    if (row >= block.count) {
        std::fill(scores, scores + block.seen, 0.0f);
        return 0.0f;
    }
    std::fill(scores + known, scores + block.seen, -INFINITY);
    Vf top = load<Vf>(scores);
    for (int64_t c = L; c < known; c += L) top = max(top, load<Vf>(scores + c));
    const Vf largest = splat(max(top));
    Vf total = {};
    for (int64_t c = 0; c < block.seen; c += L) {
        const Vf p = exp(load<Vf>(scores + c) - largest);
        total += p;
        store(scores + c, p);
    }
    return 1.0f / sum(total);
}

template <class Work>
static void each_head(const Attention& a, Work work) {
    for (int64_t row = 0; row < a.rows; row++)
        for (int64_t kv = 0; kv < a.kv_heads; kv++) work(row, kv);
}

INLINE void scores_of(const Head& q, const Block& block, const Pair* keys, int64_t size, float scale, float* to, int64_t stride) {
    product(
        [&](int64_t r) { return left_of_rows(q, block.first + r); },
        block.rows, keys, size / 2, block.seen, size / 2,
        [&](int64_t r, int64_t c, const Tile& tile) {
            UNROLL for (int i = 0; i < ROWS; i++) {
                const Vf scaled[2] = {tile[i][0] * scale, tile[i][1] * scale};
                put(to + (r + i) * stride + c, scaled);
            }
        }
    );
}

static void attention_forward(const Attention& a, uint16_t* out) {
    static thread_local Scratch memory[4];
    const int64_t T = up(a.tokens, COLUMNS), S = a.size, group = a.heads / a.kv_heads;
    const float scale = 1.0f / std::sqrt((float)S);
    Pair *keys = memory[0].of<Pair>(T / 2 * S), *values = memory[1].of<Pair>(T / 2 * S);
    float* scores = memory[2].of<float>(QUERIES * T);
    Half* p = memory[3].of<Half>(QUERIES * T);
    each_head(a, [&](int64_t row, int64_t kv) {
        panels_over_columns(head_of(a.k, a, a.kv_heads, row, kv), T, S, keys);
        panels_over_rows(head_of(a.v, a, a.kv_heads, row, kv), T, S, values);
        for (int64_t head = kv * group; head < (kv + 1) * group; head++)
            for (int64_t first = 0; first < a.tokens; first += QUERIES) {
                const Block block(first, a.tokens);
                float over[QUERIES];
                scores_of(head_of(a.q, a, a.heads, row, head), block, keys, S, scale, scores, T);
                for (int64_t r = 0; r < block.rows; r++) {
                    over[r] = softmax(scores + r * T, r, block);
                    for (int64_t c = 0; c < block.seen; c += L) store(p + r * T + c, narrow(load<Vf>(scores + r * T + c)));
                }
                product(
                    [&](int64_t r) { return left_of_rows([&](int64_t i) { return p + i * T; }, r); },
                    block.rows, values, T / 2, S, block.seen / 2,
                    [&](int64_t r, int64_t c, const Tile& tile) {
                        for (int64_t i = 0; i < ROWS && r + i < block.count; i++) {
                            const Vf whole[2] = {tile[i][0] * over[r + i], tile[i][1] * over[r + i]};
                            put(out + ((row * a.tokens + first + r + i) * a.heads + head) * S + c, whole);
                        }
                    }
                );
            }
    });
}

// Gradients of scores, from probabilities and their gradients: in pairs of rows for products over queries, with the
// probabilities likewise, and in rows for those over keys.
struct Turned {
    Pair *p, *d;  // bundles [keys / 8][QUERIES / 2][8]
    Half* rows;   // [QUERIES, stride]

    void take(float* p_, const float* d_, int64_t stride, const Block& block, const float* over, const float* delta, float scale) {
        for (int64_t r = 0; r < block.rows; r += 2)
            for (int64_t c = 0; c < block.seen; c += L) {
                Vh changed[2], chances[2];
                UNROLL for (int n = 0; n < 2; n++) {
                    const int64_t at = (r + n) * stride + c;
                    const Vf chance = load<Vf>(p_ + at) * over[r + n];
                    chances[n] = narrow(chance);
                    changed[n] = narrow(chance * (load<Vf>(d_ + at) - delta[r + n]) * scale);
                    store(rows + at, changed[n]);
                }
                const int64_t to = (c / ROWS * (QUERIES / 2) + r / 2) * ROWS;
                bundle(paired(chances[0], chances[1]), p + to, QUERIES / 2);
                bundle(paired(changed[0], changed[1]), d + to, QUERIES / 2);
            }
    }
};

INLINE float dot(const Half* x, const Half* y, int64_t size) {
    Vf total = {};
    for (int64_t i = 0; i < size; i += L) total = fma(wide(x + i), wide(y + i), total);
    return sum(total);
}

static void attention_backward(
    const Attention& a, const uint16_t* out, const uint16_t* grad, float* dq, float* dk, float* dv
) {
    static thread_local Scratch memory[9];
    const int64_t T = up(a.tokens, COLUMNS), S = a.size, group = a.heads / a.kv_heads;
    const float scale = 1.0f / std::sqrt((float)S);
    Pair *keys = memory[0].of<Pair>(T / 2 * S), *keys_by_row = memory[1].of<Pair>(T / 2 * S);
    Pair* values = memory[2].of<Pair>(T / 2 * S);
    float *p = memory[3].of<float>(QUERIES * T), *d = memory[4].of<float>(QUERIES * T);
    Turned turned{memory[5].of<Pair>(QUERIES / 2 * T), memory[6].of<Pair>(QUERIES / 2 * T), memory[7].of<Half>(QUERIES * T)};
    Pair* panels = memory[8].of<Pair>(QUERIES / 2 * S);
    const int64_t apart = a.kv_heads * S;
    std::fill(dk, dk + a.rows * a.tokens * apart, 0.0f);
    std::fill(dv, dv + a.rows * a.tokens * apart, 0.0f);
    each_head(a, [&](int64_t row, int64_t kv) {
        const Head key = head_of(a.k, a, a.kv_heads, row, kv), value = head_of(a.v, a, a.kv_heads, row, kv);
        panels_over_columns(key, T, S, keys);
        panels_over_rows(key, T, S, keys_by_row);
        panels_over_columns(value, T, S, values);
        // dk or dv += what is bundled, times the rows of a block.
        const auto spread = [&](const Head& rows, const Pair* bundled, const Block& block, float* to) {
            panels_over_rows([&](int64_t r) { return rows(block.first + r); }, block.rows, S, panels);
            product(
                [&](int64_t r) { return left_of_bundle(bundled + r * (QUERIES / 2)); },
                block.seen, panels, block.rows / 2, S, block.rows / 2,
                [&](int64_t r, int64_t c, const Tile& tile) {
                    for (int64_t i = 0; i < ROWS && r + i < a.tokens; i++)
                        add(to + ((row * a.tokens + r + i) * a.kv_heads + kv) * S + c, tile[i]);
                }
            );
        };
        for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
            const Head q = head_of(a.q, a, a.heads, row, head), y = head_of(out, a, a.heads, row, head);
            const Head g = head_of(grad, a, a.heads, row, head);
            for (int64_t first = 0; first < a.tokens; first += QUERIES) {
                const Block block(first, a.tokens);
                float over[QUERIES], delta[QUERIES];
                scores_of(q, block, keys, S, scale, p, T);
                for (int64_t r = 0; r < block.rows; r++) {
                    over[r] = softmax(p + r * T, r, block);
                    delta[r] = dot(y(first + r), g(first + r), S);
                }
                scores_of(g, block, values, S, 1.0f, d, T);
                turned.take(p, d, T, block, over, delta, scale);
                product(
                    [&](int64_t r) { return left_of_rows([&](int64_t i) { return turned.rows + i * T; }, r); },
                    block.rows, keys_by_row, T / 2, S, block.seen / 2,
                    [&](int64_t r, int64_t c, const Tile& tile) {
                        for (int64_t i = 0; i < ROWS && r + i < block.count; i++)
                            put(dq + ((row * a.tokens + first + r + i) * a.heads + head) * S + c, tile[i]);
                    }
                );
                spread(q, turned.d, block, dk);
                spread(g, turned.p, block, dv);
            }
        }
    });
}

#endif
