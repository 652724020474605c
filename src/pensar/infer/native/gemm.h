// Products of rows with packed weights. Lanes are output columns; each sum runs over the inputs one after another, so
// that a row's result depends neither on the rows beside it nor on the threads.
//
// Weights lie in panels of NR columns, read from front to back:
//   FLOAT32   [K][NR] floats
//   BFLOAT16  [K][NV / 2][L] words, the low half of a column of vector v, the high half of one of vector v + 1
//   INT8      [K / 4][NV][L] quads of bytes, then [NR] scales of the columns
//   INT4      per part of H inputs [H / 8][NV][L] bytes with two quads' nibbles, then [NR] words, the low half a
//             scale, the high half a minimum
// Rows for the last two are, per group of G inputs, G signed bytes, their scale, the sums of both halves and what the
// offset of the weights' bytes adds to a product.
#pragma once

#include "team.h"
#include "vec.h"

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

constexpr int G = 64;     // inputs that share a scale in a row of bytes
constexpr int H = G / 2;  // and in a column of four bits

struct Linear {
    int32_t kind, outputs, inputs, panels;
    const uint8_t* data;
};

struct Group {
    int8_t bytes[G];
    float scale;
    int32_t sums[2], excess;
};

struct Rows {
    const float* x;       // [N, stride]
    const Group* groups;  // [N, groups_of(stride)]
    int64_t stride;
};

constexpr int64_t PART = H * NR / 2 + NR * 4;  // bytes of a panel's part in four bits

INLINE int64_t groups_of(int64_t inputs) { return (inputs + G - 1) / G; }

INLINE int64_t panel_bytes(int kind, int64_t inputs) {
    switch (kind) {
        case FLOAT32: return inputs * NR * 4;
        case BFLOAT16: return inputs * NR * 2;
        case INT8: return groups_of(inputs) * G * NR + NR * 4;
        default: return groups_of(inputs) * 2 * PART;
    }
}

// Where a panel of halves has column c of an input.
INLINE int half_at(int c) { return c / (2 * L) * 2 * L + c % L * 2 + c / L % 2; }

INLINE void load_columns(const float* w, Vf* b) {
    UNROLL for (int v = 0; v < NV; v++) b[v] = load<Vf>(w + v * L);
}

INLINE void load_columns(const uint16_t* w, Vf* b) {
    static_assert(NV % 2 == 0, "vectors of halves come in pairs");
    UNROLL for (int v = 0; v < NV; v += 2) halves(w + v * L, b[v], b[v + 1]);
}

// y[m][NR] of M rows, given as indices into `rows`.
template <int M, class T>
static void tile_float(const uint8_t* panel, int64_t inputs, const Rows& rows, const int64_t* index, float* y) {
    const T* w = (const T*)panel;
    const float* x[M];
    UNROLL for (int m = 0; m < M; m++) x[m] = rows.x + index[m] * rows.stride;
    Vf acc[M][NV];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = Vf{};
    for (int64_t k = 0; k < inputs; k++, w += NR) {
        Vf b[NV];
        load_columns(w, b);
        UNROLL for (int m = 0; m < M; m++) {
            const Vf a = splat(x[m][k]);
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = fma(a, b[v], acc[m][v]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++) store(y + m * NR + v * L, acc[m][v]);
}

INLINE int32_t quad(const int8_t* bytes) {
    int32_t x;
    std::memcpy(&x, bytes, 4);
    return x;
}

// total += one part of four-bit columns: (scale q + least) x, of which the second term needs the sum of x only.
template <int M>
INLINE void add_part(const uint8_t* w, const Group* const* x, int part, Vf (*total)[NV]) {
    Vi acc[M][NV];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = Vi{};
    UNROLL for (int k = 0; k < H; k += 8)
        UNROLL for (int v = 0; v < NV; v++) {
            const Vb b = load<Vb>(w + (k / 8 * NV + v) * 4 * L), low = b & 15, high = (Vb)(((Vu)b >> 4) & 0x0f0f0f0f);
            UNROLL for (int m = 0; m < M; m++) {
                acc[m][v] = dot_nibbles(acc[m][v], low, quad(x[m]->bytes + part * H + k));
                acc[m][v] = dot_nibbles(acc[m][v], high, quad(x[m]->bytes + part * H + k + 4));
            }
        }
    w += H * NR / 2;
    UNROLL for (int v = 0; v < NV; v++) {
        Vf scale, least;
        halves(w + v * 4 * L, scale, least);
        UNROLL for (int m = 0; m < M; m++) {
            const Vf product = __builtin_convertvector(acc[m][v], Vf) * x[m]->scale;
            total[m][v] = fma(product, scale, total[m][v]);
            total[m][v] = fma(splat(x[m]->scale * (float)x[m]->sums[part]), least, total[m][v]);
        }
    }
}

// total += one group of eight-bit columns, whose scales come at the end of the panel.
template <int M>
INLINE void add_group(const uint8_t* w, const Group* const* x, Vf (*total)[NV]) {
    Vi acc[M][NV];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++) acc[m][v] = splat(-x[m]->excess);
    UNROLL for (int k = 0; k < G; k += 4) {
        Vb b[NV];
        UNROLL for (int v = 0; v < NV; v++) b[v] = load<Vb>(w + (k / 4 * NV + v) * 4 * L);
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = dot(acc[m][v], b[v], quad(x[m]->bytes + k));
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++)
            total[m][v] = fma(__builtin_convertvector(acc[m][v], Vf), splat(x[m]->scale), total[m][v]);
}

template <int M, Kind kind>
static void tile_bytes(const uint8_t* w, int64_t inputs, const Rows& rows, const int64_t* index, float* y) {
    const int64_t groups = groups_of(inputs);
    const Group* x[M];
    UNROLL for (int m = 0; m < M; m++) x[m] = rows.groups + index[m] * groups;
    Vf total[M][NV];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < NV; v++) total[m][v] = Vf{};
    for (int64_t g = 0; g < groups; g++) {
        if constexpr (kind == INT8) {
            add_group<M>(w, x, total);
            w += G * NR;
        } else {
            UNROLL for (int part = 0; part < 2; part++, w += PART) add_part<M>(w, x, part, total);
        }
        UNROLL for (int m = 0; m < M; m++) x[m]++;
    }
    UNROLL for (int v = 0; v < NV; v++) {
        const Vf scale = kind == INT8 ? load<Vf>(w + v * 4 * L) : splat(1.0f);
        UNROLL for (int m = 0; m < M; m++)
            store(y + m * NR + v * L, kind == INT8 ? total[m][v] * scale : total[m][v]);
    }
}

// Rows of a tile, as many as the registers hold accumulators for.
#if defined(__AVX512F__) && !defined(PENSAR_GENERIC)
constexpr int MAX_FLOAT = 12, MAX_BYTES = 6;
#elif defined(__aarch64__)
constexpr int MAX_FLOAT = 6, MAX_BYTES = 3;
#elif defined(__AVX2__) && !defined(PENSAR_GENERIC)
constexpr int MAX_FLOAT = 6, MAX_BYTES = 3;
#else
constexpr int MAX_FLOAT = 2, MAX_BYTES = 2;
#endif

typedef void (*Tile)(const uint8_t*, int64_t, const Rows&, const int64_t*, float*);

template <int M>
static Tile tile_of(int kind, int num) {
    if constexpr (M > 1)
        if (num < M) return tile_of<M - 1>(kind, num);
    if (kind == FLOAT32) return tile_float<M, float>;
    if (kind == BFLOAT16) return tile_float<M, uint16_t>;
    if constexpr (M <= MAX_BYTES) return kind == INT8 ? tile_bytes<M, INT8> : tile_bytes<M, INT4>;
    return nullptr;
}

// What becomes of a product y [NR] of a row.
struct Sink {
    enum { STORE, ADD, SWIGLU } what;
    float* out;
    int64_t stride, columns;
    const float* change = nullptr;          // [N, panels * NR], what adapters add first
    const int64_t* adapters = nullptr;      // [N], -1 for none
    const float* const* gains = nullptr;    // [adapters], [panels * NR] that they multiply by then, or null
    int64_t change_stride = 0;
    const int64_t* to = nullptr;  // row r goes to row to[r]

    void take(float* y, int64_t row, int64_t panel) const {
        if (change != nullptr && adapters[row] >= 0) {
            const float* gain = gains[adapters[row]];
            for (int i = 0; i < NR; i++) y[i] += change[row * change_stride + panel * NR + i];
            if (gain != nullptr)
                for (int i = 0; i < NR; i++) y[i] *= gain[panel * NR + i];
        }
        if (what == SWIGLU) {
            constexpr int half = NR / 2;  // gates, then as many ups
            UNROLL for (int i = 0; i < half; i += L) {
                const Vf gate = load<Vf>(y + i);
                store(y + i, gate / (1.0f + exp(-gate)) * load<Vf>(y + half + i));
            }
            put(y, row, panel * half, half);
        } else {
            put(y, row, panel * NR, NR);
        }
    }

    void put(const float* y, int64_t row, int64_t first, int64_t num) const {
        float* at = out + (to == nullptr ? row : to[row]) * stride + first;
        const int64_t end = columns - first < num ? columns - first : num;
        if (what == ADD)
            for (int64_t i = 0; i < end; i++) at[i] += y[i];
        else
            for (int64_t i = 0; i < end; i++) at[i] = y[i];
    }
};

// One panel for `num` rows. Tiles of nearly equal height keep the units busier than full ones and a rest.
static void panel_product(
    const Linear& w, int64_t panel, const Rows& rows, const int64_t* index, int64_t num, const Sink& sink, int64_t first = 0
) {
    alignas(64) float y[MAX_FLOAT * NR];
    const uint8_t* data = w.data + panel * panel_bytes(w.kind, w.inputs);
    const int most = w.kind <= BFLOAT16 ? MAX_FLOAT : MAX_BYTES;
    const int64_t tiles = (num + most - 1) / most;
    for (int64_t t = 0, done = 0; t < tiles; t++) {
        const int64_t height = (num - done) / (tiles - t);
        int64_t at[MAX_FLOAT];
        for (int64_t m = 0; m < height; m++) at[m] = index == nullptr ? first + done + m : index[done + m];
        tile_of<MAX_FLOAT>(w.kind, (int)height)(data, w.inputs, rows, at, y);
        for (int64_t m = 0; m < height; m++) sink.take(y + m * NR, first + done + m, panel);
        done += height;
    }
}

constexpr int64_t BLOCK = 192;  // rows that stay in a core's cache while the panels pass

static void product(Team& team, const Linear& w, const Rows& rows, int64_t num, const Sink& sink) {
    const int64_t blocks = (num + BLOCK - 1) / BLOCK;
    const int64_t share = w.panels * blocks / (team.size * 8);
    team.each(
        w.panels * blocks,
        [&](int64_t item) {
            const int64_t first = item / w.panels * BLOCK;
            const int64_t height = num - first < BLOCK ? num - first : BLOCK;
            panel_product(w, item % w.panels, rows, nullptr, height, sink, first);
        },
        share < 1 ? 1 : share
    );
}
