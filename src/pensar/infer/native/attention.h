// Causal attention over pages. A tile is up to 8 queries of one key-value head: tokens of a row times heads of a group.
// Each query's softmax runs over the row's pages in order, BLOCK_PAGES at a time, whatever else is in its tile.
#pragma once

#include "rows.h"

#include <algorithm>

constexpr int BLOCK_PAGES = 4, TOKENS = BLOCK_PAGES * PAGE, TILE = 8, TV = PAGE / L;

struct Pages {
    const uint8_t* base;     // of the layer
    const int64_t* numbers;  // of the row, in order
    int64_t page_bytes, offset;  // offset of the head within a page
    int64_t num;                 // of the row
    const uint8_t* at(int64_t i) const { return base + numbers[i] * page_bytes + offset; }
    const uint8_t* after(int64_t i, const uint8_t* none) const { return i < num ? at(i) : none; }
};

template <class T>
INLINE Vf number(const T* p) {
    if constexpr (sizeof(T) == 4) return load<Vf>(p);
    if constexpr (sizeof(T) == 2) return from_bfloat16(load<Vh>(p));
    // By way of 16 bits: compilers have instructions for each step, and take bytes to floats one by one.
    typedef int16_t Vw __attribute__((vector_size(2 * L)));
    if constexpr (sizeof(T) == 1)
        return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(load<Vs>(p), Vw), Vi), Vf);
}

// A vector that several queries use is read once: left alone, the compiler reads it from memory for each of them.
template <int Q>
INLINE Vf held(Vf v) {
#if defined(__AVX512F__) && !defined(PENSAR_GENERIC)
    if constexpr (Q > 1) asm("" : "+v"(v));
#endif
    return v;
}

// Scores of Q queries with the tokens of P pages from page `first` on. The sum over a head's numbers is sequential; pages
// side by side keep the units busy.
template <class T, int Q, int P>
static void score_pages(const float* const* q, const Pages& pages, int64_t first, int64_t h, float* s) {
    const T* keys[P];
    UNROLL for (int p = 0; p < P; p++) keys[p] = (const T*)pages.at(first + p);
    Vf acc[Q][P][TV];
    UNROLL for (int i = 0; i < Q; i++)
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < TV; v++) acc[i][p][v] = Vf{};
    for (int64_t d = 0; d < h; d++) {
        // Few queries: memory is what counts. The values of these pages come next.
        if (Q <= 4) UNROLL for (int p = 0; p < P; p++) __builtin_prefetch(keys[p] + (h + d) * PAGE);
        Vf k[P][TV];
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int v = 0; v < TV; v++) k[p][v] = held<Q>(number(keys[p] + d * PAGE + v * L));
        UNROLL for (int i = 0; i < Q; i++)
            UNROLL for (int p = 0; p < P; p++)
                UNROLL for (int v = 0; v < TV; v++) acc[i][p][v] = fma(splat(q[i][d]), k[p][v], acc[i][p][v]);
    }
    UNROLL for (int p = 0; p < P; p++) {
        const float* scales = (const float*)(keys[p] + h * PAGE + wide(h) * PAGE);
        UNROLL for (int v = 0; v < TV; v++)
            UNROLL for (int i = 0; i < Q; i++) {
                Vf score = acc[i][p][v];
                if constexpr (sizeof(T) == 1) score *= load<Vf>(scales + v * L);
                store(s + i * TOKENS + p * PAGE + v * L, score);
            }
    }
}

template <class T, int Q, int P>
static void score_some(
    int64_t num, const float* const* q, const Pages& pages, int64_t first, int64_t h, float* s
) {
    if constexpr (P > 1)
        if (num < P) return score_some<T, Q, P - 1>(num, q, pages, first, h, s);
    score_pages<T, Q, P>(q, pages, first, h, s);
}

// out[Q][wide] += the block's weights times its values, token by token; W vectors of a head at once.
template <class T, int Q, int W>
static void add_values(
    const float* s, const Pages& pages, int64_t first, int64_t tokens, int64_t h, int64_t column, float* out
) {
    const int64_t w = wide(h);
    Vf acc[Q][W];
    UNROLL for (int i = 0; i < Q; i++)
        UNROLL for (int v = 0; v < W; v++) acc[i][v] = load<Vf>(out + i * w + column + v * L);
    for (int64_t begin = 0; begin < tokens; begin += PAGE) {
        const T* values = (const T*)pages.at(first + begin / PAGE) + h * PAGE;
        const float* scales = (const float*)(values + PAGE * w) + PAGE;
        const int64_t num = tokens - begin < PAGE ? tokens - begin : PAGE;
        const T* next = (const T*)pages.after(first + begin / PAGE + BLOCK_PAGES, (const uint8_t*)values) + column * PAGE;
        for (int64_t t = 0; t < num; t++) {
            if (Q <= 4) UNROLL for (int v = 0; v < W; v++) __builtin_prefetch(next + (t * W + v) * L);
            Vf value[W];
            UNROLL for (int v = 0; v < W; v++) value[v] = held<Q>(number(values + t * w + column + v * L));
            UNROLL for (int i = 0; i < Q; i++) {
                float weight = s[i * TOKENS + begin + t];
                if constexpr (sizeof(T) == 1) weight = weight == 0 ? 0 : weight * scales[t];
                UNROLL for (int v = 0; v < W; v++) acc[i][v] = fma(splat(weight), value[v], acc[i][v]);
            }
        }
    }
    UNROLL for (int i = 0; i < Q; i++)
        UNROLL for (int v = 0; v < W; v++) store(out + i * w + column + v * L, acc[i][v]);
}

template <class T, int Q>
static void add_block(const float* s, const Pages& pages, int64_t first, int64_t tokens, int64_t h, float* out) {
    int64_t column = 0;
    for (; column + 4 * L <= wide(h); column += 4 * L) add_values<T, Q, 4>(s, pages, first, tokens, h, column, out);
    for (; column + 2 * L <= wide(h); column += 2 * L) add_values<T, Q, 2>(s, pages, first, tokens, h, column, out);
    for (; column < wide(h); column += L) add_values<T, Q, 1>(s, pages, first, tokens, h, column, out);
}

// The block's scores become weights, relative to the largest score so far; what was summed before is brought to it.
template <int Q>
static void soften(float* s, int64_t tokens, float* largest, float* total, float* out, int64_t w) {
    constexpr int WHOLE = (Q + L - 1) / L * L;
    alignas(64) float factor[WHOLE] = {};
    for (int i = 0; i < Q; i++) {
        Vf top = load<Vf>(s + i * TOKENS);
        for (int64_t t = L; t < tokens; t += L) top = max(top, load<Vf>(s + i * TOKENS + t));
        const float now = std::fmax(largest[i], max(top));
        factor[i] = largest[i] - now;
        largest[i] = now;
    }
    for (int i = 0; i < WHOLE; i += L) store(factor + i, exp(load<Vf>(factor + i)));
    for (int i = 0; i < Q; i++) {
        Vf weights = Vf{};
        for (int64_t t = i * TOKENS; t < i * TOKENS + tokens; t += L) {
            const Vf weight = exp(load<Vf>(s + t) - largest[i]);
            weights += weight;
            store(s + t, weight);
        }
        total[i] = total[i] * factor[i] + sum(weights);
        if (factor[i] != 1)
            for (int64_t j = i * w; j < i * w + w; j += L) store(out + j, load<Vf>(out + j) * factor[i]);
    }
}

// Whether a block's values of some tokens are numbers: a guess or another token behind a query must not break it, and
// nothing times NaN is NaN. Values of bytes are skipped where their weight is nothing.
template <class T>
static bool sound(const Pages& pages, int64_t first, int64_t from, int64_t to, int64_t h) {
    if constexpr (sizeof(T) == 1) return true;
    Vf nothing = Vf{};
    for (int64_t t = from; t < to; t++) {
        const T* values = (const T*)pages.at(first + t / PAGE) + h * PAGE + t % PAGE * wide(h);
        for (int64_t i = 0; i < wide(h); i += L) nothing += number(values + i) * 0.0f;
    }
    return sum(nothing) == 0;
}

template <class T, int Q>
static void attend_tile(const float* const* q, const int64_t* limits, const Pages& pages, int64_t h, float* const* to) {
    constexpr int P = Q * TV >= 8 ? 1 : Q * TV >= 4 ? 2 : 4;
    thread_local std::vector<float> room;
    const int64_t w = wide(h);
    if ((int64_t)room.size() < Q * w) room.resize(TILE * w);
    float* out = room.data();
    std::memset(out, 0, Q * w * sizeof(float));
    float largest[Q], total[Q];
    int64_t longest = 0, shortest = limits[0];
    for (int i = 0; i < Q; i++) {
        largest[i] = -INFINITY, total[i] = 0;
        longest = std::max(longest, limits[i]);
        shortest = std::min(shortest, limits[i]);
    }
    for (int64_t begin = 0; begin < longest; begin += TOKENS) {
        alignas(64) float s[Q * TOKENS];
        const int64_t tokens = std::min<int64_t>(longest - begin, TOKENS), num = (tokens + PAGE - 1) / PAGE;
        const int64_t first = begin / PAGE;
        for (int64_t page = 0; page < num; page += P)
            score_some<T, Q, P>(std::min<int64_t>(P, num - page), q, pages, first + page, h, s + page * PAGE);
        for (int i = 0; i < Q; i++)
            for (int64_t t = std::max<int64_t>(limits[i] - begin, 0); t < num * PAGE; t++) s[i * TOKENS + t] = -INFINITY;
        soften<Q>(s, num * PAGE, largest, total, out, w);
        if (shortest < begin + tokens && !sound<T>(pages, first, shortest < begin ? 0 : shortest - begin, tokens, h)) {
            for (int i = 0; i < Q; i++)
                if (limits[i] > begin)
                    add_block<T, 1>(s + i * TOKENS, pages, first, std::min(limits[i] - begin, tokens), h, out + i * w);
        } else if constexpr (Q > 4) {
            add_block<T, 4>(s, pages, first, tokens, h, out);
            add_block<T, Q - 4>(s + 4 * TOKENS, pages, first, tokens, h, out + 4 * w);
        } else {
            add_block<T, Q>(s, pages, first, tokens, h, out);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int64_t d = 0; d < h; d++) to[i][d] = out[i * w + d] / total[i];
}

template <class T, int Q = TILE>
static void attend_some(
    int num, const float* const* q, const int64_t* limits, const Pages& pages, int64_t h, float* const* to
) {
    if constexpr (Q > 1)
        if (num < Q) return attend_some<T, Q - 1>(num, q, limits, pages, h, to);
    attend_tile<T, Q>(q, limits, pages, h, to);
}

static void attend(
    int cache, int num, const float* const* q, const int64_t* limits, const Pages& pages, int64_t h, float* const* to
) {
    if (cache == CACHE_FLOAT32) return attend_some<float>(num, q, limits, pages, h, to);
    if (cache == CACHE_BFLOAT16) return attend_some<uint16_t>(num, q, limits, pages, h, to);
    attend_some<int8_t>(num, q, limits, pages, h, to);
}
