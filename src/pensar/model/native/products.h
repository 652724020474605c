// Products with sums in float32, for training: 8 rows by 32 columns in registers at a time.
//
// Numbers T are float, or Half, of which the processor multiplies two at a time that lie side by side along what is
// summed over. A word holds as many: one float or two halves. Left operands are rows of words, or bundles
// [rows / 8][words][8] where the sum runs over the rows of what is at hand; right operands are panels
// [columns / 32][words][32].
#pragma once

#include <cstdlib>
#include <type_traits>
#include <vector>

#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(PENSAR_GENERIC)
#define PENSAR_FLOATS 1
// Processors with units for whole tiles are left to libraries that use them.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define PENSAR_HALVES 1
#endif

typedef uint16_t Half;
typedef uint32_t Word;

constexpr int ROWS = 8, COLUMNS = 32;

template <class T>
constexpr int DEPTH = sizeof(Word) / sizeof(T);  // numbers of a word

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Vf wide(const Half* p) { return from_bfloat16(load<Vh>(p)); }
INLINE Vf wide(const float* p) { return load<Vf>(p); }

// L numbers as they are kept.
template <class T>
using Kept = std::conditional_t<std::is_same_v<T, float>, Vf, Vh>;

template <class T>
INLINE Kept<T> kept(Vf x) {
    if constexpr (std::is_same_v<T, float>) {
        return x;
    } else {
#if PENSAR_HALVES
        return (Vh)_mm512_cvtneps_pbh((__m512)x);
#else
        return Vh{};
#endif
    }
}

INLINE Vu spread(Vh h) { return (Vu)_mm512_cvtepu16_epi32((__m256i)h); }

// L words of DEPTH numbers each.
INLINE Vu joined(const Vf (&v)[1]) { return (Vu)v[0]; }
INLINE Vu joined(const Vh (&v)[2]) { return spread(v[0]) | (spread(v[1]) << 16); }

// L words of the rows from word p on, L columns of each.
template <class T, class Row>
INLINE Vu words_over_rows(Row row, int64_t p, int64_t c) {
    Kept<T> v[DEPTH<T>];
    UNROLL for (int n = 0; n < DEPTH<T>; n++) {
        const auto* at = row(DEPTH<T> * p + n) + c;
        if constexpr (std::is_same_v<decltype(at), const T*>)
            v[n] = load<Kept<T>>(at);
        else
            v[n] = kept<T>(wide(at));
    }
    return joined(v);
}

// L words that lie side by side in a row.
template <class T>
INLINE Vu words_at(const T* p) {
    return load<Vu>(p);
}

#if PENSAR_HALVES
template <class T>
INLINE std::enable_if_t<std::is_same_v<T, Half>, Vu> words_at(const float* p) {
    return (Vu)_mm512_cvtne2ps_pbh((__m512)load<Vf>(p + L), (__m512)load<Vf>(p));
}
#endif

// Memory that grows and stays.
struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }

    template <class T>
    T* of(int64_t count) {
        const size_t wanted = (size_t)up(count * (int64_t)sizeof(T), 64);
        if (wanted > size) {
            std::free(data);
            data = std::aligned_alloc(64, size = wanted);
        }
        return (T*)data;
    }
};

// A row of zeros, with which others are rounded up.
template <class T>
INLINE const T* zeros(int64_t size) {
    static thread_local std::vector<T> row;
    if ((int64_t)row.size() < size) row.assign(size, 0);
    return row.data();
}

INLINE void transpose(Vu v[16]) {
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
        a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        v[i] = (Vu)_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        v[i + 8] = (Vu)_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
        v[i + 4] = (Vu)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
        v[i + 12] = (Vu)_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
    }
}

// Panels of a matrix whose rows are summed over; `row` gives row r. `rows` fill words, `columns` panels.
template <class T, class Row>
INLINE void panels_over_rows(Row row, int64_t rows, int64_t columns, Word* out) {
    const int64_t words = rows / DEPTH<T>;
    for (int64_t p = 0; p < words; p++)
        for (int64_t c = 0; c < columns; c += L)
            store(out + (c / COLUMNS * words + p) * COLUMNS + c % COLUMNS, words_over_rows<T>(row, p, c));
}

// Panels of the transpose of a matrix: its columns are summed over. `rows` and `columns` are multiples of 32.
template <class T, class Row>
INLINE void panels_over_columns(Row row, int64_t rows, int64_t columns, Word* out) {
    const int64_t words = columns / DEPTH<T>;
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t p = 0; p < words; p += L) {
            Vu v[L];
            UNROLL for (int i = 0; i < L; i++) v[i] = words_at<T>(row(r + i) + DEPTH<T> * p);
            transpose(v);
            UNROLL for (int i = 0; i < L; i++)
                store(out + (r / COLUMNS * words + p + i) * COLUMNS + r % COLUMNS, v[i]);
        }
}

// L columns of one word, into bundles of `words` words.
INLINE void bundle(Vu v, Word* out, int64_t words) {
    const __m512i all = (__m512i)v;
    _mm256_storeu_si256((__m256i*)out, _mm512_castsi512_si256(all));
    _mm256_storeu_si256((__m256i*)(out + words * ROWS), _mm512_extracti64x4_epi64(all, 1));
}

template <class T, class Row>
INLINE void bundles_over_rows(Row row, int64_t rows, int64_t columns, Word* out) {
    const int64_t words = rows / DEPTH<T>;
    for (int64_t p = 0; p < words; p++)
        for (int64_t c = 0; c < columns; c += L)
            bundle(words_over_rows<T>(row, p, c), out + (c / ROWS * words + p) * ROWS, words);
}

// Eight rows of words: row i has word p at at[i][p * stride].
struct Left {
    const Word* at[ROWS];
    int64_t stride;
};

template <class Row>
INLINE Left left_of_rows(Row row, int64_t first) {
    Left left;
    UNROLL for (int i = 0; i < ROWS; i++) left.at[i] = (const Word*)row(first + i);
    left.stride = 1;
    return left;
}

INLINE Left left_of_bundle(const Word* bundle) {
    Left left;
    UNROLL for (int i = 0; i < ROWS; i++) left.at[i] = bundle + i;
    left.stride = ROWS;
    return left;
}

template <class T>
INLINE Vf multiplied(Vf sum, Vu a, Vu b) {
    if constexpr (std::is_same_v<T, float>) {
        return fma((Vf)a, (Vf)b, sum);
    } else {
#if PENSAR_HALVES
        return (Vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
        return sum;
#endif
    }
}

typedef Vf Tile[ROWS][2];

// sink(first row, first column, tile) for all of left(first row) times the panels, `apart` words from one to the next.
template <class T, class LeftAt, class Sink>
INLINE void product(
    LeftAt left_at, int64_t rows, const Word* panels, int64_t apart, int64_t columns, int64_t words, Sink sink
) {
    for (int64_t c = 0; c < columns; c += COLUMNS)
        for (int64_t r = 0; r < rows; r += ROWS) {
            const Left left = left_at(r);
            const Word* b = panels + c * apart;
            Tile acc;
            UNROLL for (int i = 0; i < ROWS; i++) acc[i][0] = acc[i][1] = Vf{};
            for (int64_t p = 0; p < words; p++, b += COLUMNS) {
                const Vu b0 = load<Vu>(b), b1 = load<Vu>(b + L);
                UNROLL for (int i = 0; i < ROWS; i++) {
                    const Vu a = left.at[i][p * left.stride] - Vu{};
                    acc[i][0] = multiplied<T>(acc[i][0], a, b0);
                    acc[i][1] = multiplied<T>(acc[i][1], a, b1);
                }
            }
            sink(r, c, acc);
        }
}

template <class T>
INLINE void put(T* at, const Vf* row) {
    store(at, kept<T>(row[0]));
    store(at + L, kept<T>(row[1]));
}

INLINE void add(float* at, const Vf* row) {
    store(at, load<Vf>(at) + row[0]);
    store(at + L, load<Vf>(at + L) + row[1]);
}

#endif
