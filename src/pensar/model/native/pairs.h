// Products of numbers in bfloat16 with sums in float32, for training: 8 rows by 32 columns in registers at a time.
//
// The processor multiplies pairs that lie side by side along what is summed over. Left operands are rows of pairs, or
// bundles [rows / 8][pairs][8] where the sum runs over the rows of what is at hand; right operands are panels
// [columns / 32][pairs][32].
#pragma once

#include <cstdlib>
#include <vector>

#include "vec.h"

// Processors with units for whole tiles are left to libraries that use them.
#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(__AMX_BF16__) && !defined(PENSAR_GENERIC)
#define PENSAR_PAIRS 1

typedef uint16_t Half;
typedef uint32_t Pair;

constexpr int ROWS = 8, COLUMNS = 32;

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Vh narrow(Vf x) { return (Vh)_mm512_cvtneps_pbh((__m512)x); }
INLINE Vf wide(const Half* p) { return from_bfloat16(load<Vh>(p)); }
INLINE Vf wide(const float* p) { return load<Vf>(p); }
INLINE Vu words(Vh h) { return (Vu)_mm512_cvtepu16_epi32((__m256i)h); }

// The first numbers of L pairs, and the second.
INLINE Vu paired(Vh low, Vh high) { return words(low) | (words(high) << 16); }
INLINE Vu paired(Vf low, Vf high) { return paired(narrow(low), narrow(high)); }
INLINE Vu paired(const Half* low, const Half* high) { return paired(load<Vh>(low), load<Vh>(high)); }
INLINE Vu paired(const float* low, const float* high) { return paired(load<Vf>(low), load<Vf>(high)); }

// L pairs that lie side by side.
INLINE Vu pairs_at(const Half* p) { return load<Vu>(p); }
INLINE Vu pairs_at(const float* p) {
    return (Vu)_mm512_cvtne2ps_pbh((__m512)load<Vf>(p + L), (__m512)load<Vf>(p));
}

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
INLINE const Half* zeros(int64_t size) {
    static thread_local std::vector<Half> row;
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

// Panels of a matrix whose rows are summed over; `row` gives row r. `rows` is even, `columns` a multiple of 32.
template <class Row>
INLINE void panels_over_rows(Row row, int64_t rows, int64_t columns, Pair* out) {
    for (int64_t p = 0; p < rows / 2; p++) {
        const auto *low = row(2 * p), *high = row(2 * p + 1);
        for (int64_t c = 0; c < columns; c += L)
            store(out + (c / COLUMNS * (rows / 2) + p) * COLUMNS + c % COLUMNS, paired(low + c, high + c));
    }
}

// Panels of the transpose of a matrix: its columns are summed over. `rows` and `columns` are multiples of 32.
template <class Row>
INLINE void panels_over_columns(Row row, int64_t rows, int64_t columns, Pair* out) {
    const int64_t pairs = columns / 2;
    for (int64_t r = 0; r < rows; r += L)
        for (int64_t p = 0; p < pairs; p += L) {
            Vu v[L];
            UNROLL for (int i = 0; i < L; i++) v[i] = pairs_at(row(r + i) + 2 * p);
            transpose(v);
            UNROLL for (int i = 0; i < L; i++)
                store(out + (r / COLUMNS * pairs + p + i) * COLUMNS + r % COLUMNS, v[i]);
        }
}

// L columns of one pair of rows, into bundles of `pairs` pairs.
INLINE void bundle(Vu v, Pair* out, int64_t pairs) {
    const __m512i all = (__m512i)v;
    _mm256_storeu_si256((__m256i*)out, _mm512_castsi512_si256(all));
    _mm256_storeu_si256((__m256i*)(out + pairs * ROWS), _mm512_extracti64x4_epi64(all, 1));
}

template <class Row>
INLINE void bundles_over_rows(Row row, int64_t rows, int64_t columns, Pair* out) {
    for (int64_t p = 0; p < rows / 2; p++) {
        const auto *low = row(2 * p), *high = row(2 * p + 1);
        for (int64_t c = 0; c < columns; c += L)
            bundle(paired(low + c, high + c), out + (c / ROWS * (rows / 2) + p) * ROWS, rows / 2);
    }
}

// Eight rows of pairs: row i has pair p at at[i][p * stride].
struct Left {
    const Pair* at[ROWS];
    int64_t stride;
};

template <class Row>
INLINE Left left_of_rows(Row row, int64_t first) {
    Left left;
    UNROLL for (int i = 0; i < ROWS; i++) left.at[i] = (const Pair*)row(first + i);
    left.stride = 1;
    return left;
}

INLINE Left left_of_bundle(const Pair* bundle) {
    Left left;
    UNROLL for (int i = 0; i < ROWS; i++) left.at[i] = bundle + i;
    left.stride = ROWS;
    return left;
}

typedef Vf Tile[ROWS][2];

// sink(first row, first column, tile) for all of left(first row) times the panels, `apart` pairs from one to the next.
template <class LeftAt, class Sink>
INLINE void product(
    LeftAt left_at, int64_t rows, const Pair* panels, int64_t apart, int64_t columns, int64_t pairs, Sink sink
) {
    for (int64_t c = 0; c < columns; c += COLUMNS)
        for (int64_t r = 0; r < rows; r += ROWS) {
            const Left left = left_at(r);
            const Pair* b = panels + c * apart;
            Tile acc;
            UNROLL for (int i = 0; i < ROWS; i++) acc[i][0] = acc[i][1] = Vf{};
            for (int64_t p = 0; p < pairs; p++, b += COLUMNS) {
                const __m512bh b0 = (__m512bh)load<Vu>(b), b1 = (__m512bh)load<Vu>(b + L);
                UNROLL for (int i = 0; i < ROWS; i++) {
                    const __m512bh a = (__m512bh)_mm512_set1_epi32((int)left.at[i][p * left.stride]);
                    acc[i][0] = (Vf)_mm512_dpbf16_ps((__m512)acc[i][0], a, b0);
                    acc[i][1] = (Vf)_mm512_dpbf16_ps((__m512)acc[i][1], a, b1);
                }
            }
            sink(r, c, acc);
        }
}

INLINE void put(float* at, const Vf* row) {
    store(at, row[0]);
    store(at + L, row[1]);
}

INLINE void add(float* at, const Vf* row) {
    store(at, load<Vf>(at) + row[0]);
    store(at + L, load<Vf>(at + L) + row[1]);
}

INLINE void put(Half* at, const Vf* row) {
    store(at, narrow(row[0]));
    store(at + L, narrow(row[1]));
}

#endif
