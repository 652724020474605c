// Causal attention in training: blocks of queries of one head against the keys before them, all of a block's scores
// in the cache (arXiv 2205.14135 without its outer tiles, which a cache of a megabyte does not need).
#pragma once

#include <algorithm>
#include <cmath>

#include "products.h"

struct Attention {
    int64_t rows, tokens, heads, kv_heads, size;
    const void* q;        // [rows, tokens, heads, size] of T
    const void *k, *v;    // [rows, tokens, kv_heads, size] of T
};

#if PENSAR_FLOATS

constexpr int64_t QUERIES = 64;  // of a block

// What belongs to one head of one row of [rows, tokens, heads, size]: a row of numbers for each token, zeros beyond.
template <class T>
struct Head {
    const T* data;
    int64_t stride, tokens;
    const T* nothing;
    const T* operator()(int64_t t) const { return t < tokens ? data + t * stride : nothing; }
};

template <class T>
INLINE Head<T> head_of(const void* x, const Attention& a, int64_t heads, int64_t row, int64_t head) {
    return {(const T*)x + (row * a.tokens * heads + head) * a.size, heads * a.size, a.tokens, zeros<T>(a.size)};
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

template <class T>
INLINE void scores_of(
    const Head<T>& q, const Block& block, const Word* keys, int64_t size, float scale, float* to, int64_t stride
) {
    product<T>(
        [&](int64_t r) { return left_of_rows(q, block.first + r); },
        block.rows, keys, size / DEPTH<T>, block.seen, size / DEPTH<T>,
        [&](int64_t r, int64_t c, const Tile& tile) {
            UNROLL for (int i = 0; i < ROWS; i++) {
                const Vf scaled[2] = {tile[i][0] * scale, tile[i][1] * scale};
                put(to + (r + i) * stride + c, scaled);
            }
        }
    );
}

template <class T>
static void attention_forward(const Attention& a, void* out) {
    static thread_local Scratch memory[4];
    const int64_t N = up(a.tokens, COLUMNS), S = a.size, group = a.heads / a.kv_heads;
    const float scale = 1.0f / std::sqrt((float)S);
    Word *keys = memory[0].of<Word>(N * S / DEPTH<T>), *values = memory[1].of<Word>(N * S / DEPTH<T>);
    float* scores = memory[2].of<float>(QUERIES * N);
    T* p = memory[3].of<T>(QUERIES * N);
    each_head(a, [&](int64_t row, int64_t kv) {
        panels_over_columns<T>(head_of<T>(a.k, a, a.kv_heads, row, kv), N, S, keys);
        panels_over_rows<T>(head_of<T>(a.v, a, a.kv_heads, row, kv), N, S, values);
        for (int64_t head = kv * group; head < (kv + 1) * group; head++)
            for (int64_t first = 0; first < a.tokens; first += QUERIES) {
                const Block block(first, a.tokens);
                float over[QUERIES];
                scores_of(head_of<T>(a.q, a, a.heads, row, head), block, keys, S, scale, scores, N);
                for (int64_t r = 0; r < block.rows; r++) {
                    over[r] = softmax(scores + r * N, r, block);
                    for (int64_t c = 0; c < block.seen; c += L)
                        store(p + r * N + c, kept<T>(load<Vf>(scores + r * N + c)));
                }
                product<T>(
                    [&](int64_t r) { return left_of_rows([&](int64_t i) { return p + i * N; }, r); },
                    block.rows, values, N / DEPTH<T>, S, block.seen / DEPTH<T>,
                    [&](int64_t r, int64_t c, const Tile& tile) {
                        for (int64_t i = 0; i < ROWS && r + i < block.count; i++) {
                            const Vf whole[2] = {tile[i][0] * over[r + i], tile[i][1] * over[r + i]};
                            put((T*)out + ((row * a.tokens + first + r + i) * a.heads + head) * S + c, whole);
                        }
                    }
                );
            }
    });
}

// Probabilities and the gradients of scores, to be summed over queries; and the latter in rows, over keys.
template <class T>
struct Turned {
    Word *p, *d;  // bundles [keys / 8][WORDS][8]
    T* rows;      // [QUERIES, stride]
    static constexpr int64_t WORDS = QUERIES / DEPTH<T>;

    void take(
        const float* chances, const float* changes, int64_t stride, const Block& block, const float* over,
        const float* delta, float scale
    ) {
        for (int64_t w = 0; w < block.rows / DEPTH<T>; w++)
            for (int64_t c = 0; c < block.seen; c += L) {
                Kept<T> chance[DEPTH<T>], change[DEPTH<T>];
                UNROLL for (int n = 0; n < DEPTH<T>; n++) {
                    const int64_t r = DEPTH<T> * w + n, at = r * stride + c;
                    const Vf exact = load<Vf>(chances + at) * over[r];
                    chance[n] = kept<T>(exact);
                    change[n] = kept<T>(exact * (load<Vf>(changes + at) - delta[r]) * scale);
                    store(rows + at, change[n]);
                }
                const int64_t to = (c / ROWS * WORDS + w) * ROWS;
                bundle(joined(chance), p + to, WORDS);
                bundle(joined(change), d + to, WORDS);
            }
    }
};

template <class T>
INLINE float dot(const T* x, const T* y, int64_t size) {
    Vf total = {};
    for (int64_t i = 0; i < size; i += L) total = fma(wide(x + i), wide(y + i), total);
    return sum(total);
}

template <class T>
static void attention_backward(
    const Attention& a, const void* out, const void* grad, float* dq, float* dk, float* dv
) {
    static thread_local Scratch memory[9];
    constexpr int64_t WORDS = Turned<T>::WORDS;
    const int64_t N = up(a.tokens, COLUMNS), S = a.size, group = a.heads / a.kv_heads, words = N * S / DEPTH<T>;
    const float scale = 1.0f / std::sqrt((float)S);
    Word *keys = memory[0].of<Word>(words), *keys_by_row = memory[1].of<Word>(words);
    Word* values = memory[2].of<Word>(words);
    float *p = memory[3].of<float>(QUERIES * N), *d = memory[4].of<float>(QUERIES * N);
    Turned<T> turned{memory[5].of<Word>(WORDS * N), memory[6].of<Word>(WORDS * N), memory[7].of<T>(QUERIES * N)};
    Word* panels = memory[8].of<Word>(WORDS * S);
    std::fill(dk, dk + a.rows * a.tokens * a.kv_heads * S, 0.0f);
    std::fill(dv, dv + a.rows * a.tokens * a.kv_heads * S, 0.0f);
    each_head(a, [&](int64_t row, int64_t kv) {
        const Head<T> key = head_of<T>(a.k, a, a.kv_heads, row, kv);
        panels_over_columns<T>(key, N, S, keys);
        panels_over_rows<T>(key, N, S, keys_by_row);
        panels_over_columns<T>(head_of<T>(a.v, a, a.kv_heads, row, kv), N, S, values);
        // dk or dv += what is bundled, times the rows of a block.
        const auto add_over_queries = [&](const Head<T>& rows, const Word* bundled, const Block& block, float* to) {
            panels_over_rows<T>([&](int64_t r) { return rows(block.first + r); }, block.rows, S, panels);
            product<T>(
                [&](int64_t r) { return left_of_bundle(bundled + r * WORDS); },
                block.seen, panels, block.rows / DEPTH<T>, S, block.rows / DEPTH<T>,
                [&](int64_t r, int64_t c, const Tile& tile) {
                    for (int64_t i = 0; i < ROWS && r + i < a.tokens; i++)
                        add(to + ((row * a.tokens + r + i) * a.kv_heads + kv) * S + c, tile[i]);
                }
            );
        };
        for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
            const Head<T> q = head_of<T>(a.q, a, a.heads, row, head), y = head_of<T>(out, a, a.heads, row, head);
            const Head<T> g = head_of<T>(grad, a, a.heads, row, head);
            for (int64_t first = 0; first < a.tokens; first += QUERIES) {
                const Block block(first, a.tokens);
                float over[QUERIES], delta[QUERIES];
                scores_of(q, block, keys, S, scale, p, N);
                for (int64_t r = 0; r < block.rows; r++) {
                    over[r] = softmax(p + r * N, r, block);
                    delta[r] = dot(y(first + r), g(first + r), S);
                }
                scores_of(g, block, values, S, 1.0f, d, N);
                turned.take(p, d, N, block, over, delta, scale);
                product<T>(
                    [&](int64_t r) { return left_of_rows([&](int64_t i) { return turned.rows + i * N; }, r); },
                    block.rows, keys_by_row, N / DEPTH<T>, S, block.seen / DEPTH<T>,
                    [&](int64_t r, int64_t c, const Tile& tile) {
                        for (int64_t i = 0; i < ROWS && r + i < block.count; i++)
                            put(dq + ((row * a.tokens + first + r + i) * a.heads + head) * S + c, tile[i]);
                    }
                );
                add_over_queries(q, turned.d, block, dk);
                add_over_queries(g, turned.p, block, dv);
            }
        }
    });
}

#endif
