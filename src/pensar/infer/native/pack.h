// Weights [outputs, inputs] into panels, and one column out of them again. `order` names the row of each column, -1 for
// a column of zeros.
#pragma once

#include "gemm.h"

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float widened(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A group as least + scale * q, q in 0 .. 15. Of ranges a little narrower than the values the one is taken whose
// squared error is least: a few clipped values cost less than coarser steps for all.
static void fit_nibbles(const float* x, int num, uint16_t* scale, uint16_t* least, uint8_t* q) {
    float low = 0, high = 0;
    for (int i = 0; i < num; i++) low = std::fmin(low, x[i]), high = std::fmax(high, x[i]);
    float best = INFINITY;
    for (int shrink = 0; shrink <= 8; shrink++) {
        const float part = 1 - 0.04f * shrink;
        const uint16_t half_scale = to_bfloat16((high - low) * part / 15), half_least = to_bfloat16(low * part);
        const float s = widened(half_scale), m = widened(half_least), inverse = s > 0 ? 1 / s : 0;
        float error = 0;
        uint8_t tried[H] = {};
        for (int i = 0; i < num; i++) {
            const float r = std::fmin(std::fmax(std::nearbyint((x[i] - m) * inverse), 0.0f), 15.0f);
            tried[i] = (uint8_t)r;
            error += (m + s * r - x[i]) * (m + s * r - x[i]);
        }
        if (error < best) {
            best = error, *scale = half_scale, *least = half_least;
            std::memcpy(q, tried, H);
        }
    }
}

static void pack_column_int8(const float* x, int64_t inputs, uint8_t* panel, int c) {
    float largest = 0;
    for (int64_t k = 0; k < inputs; k++) largest = std::fmax(largest, std::fabs(x[k]));
    const float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
    const int64_t padded = groups_of(inputs) * G;
    for (int64_t k = 0; k < padded; k++) {
        const float q = k < inputs ? std::nearbyint(x[k] * inverse) : 0;
        panel[k / 4 * 4 * NR + c * 4 + k % 4] = (uint8_t)((int)q + OFFSET);
    }
    std::memcpy(panel + padded * NR + c * 4, &scale, 4);
}

static void pack_column_int4(const float* x, int64_t inputs, uint8_t* panel, int c) {
    for (int64_t p = 0; p < groups_of(inputs) * 2; p++) {
        uint8_t* part = panel + p * PART;
        uint16_t scale = 0, least = 0;
        uint8_t q[H] = {};
        const int64_t rest = inputs - p * H;
        if (rest > 0) fit_nibbles(x + p * H, (int)(rest < H ? rest : H), &scale, &least, q);
        for (int k = 0; k < H; k += 8)
            for (int j = 0; j < 4; j++) part[k / 8 * 4 * NR + c * 4 + j] = (uint8_t)(q[k + j] | q[k + 4 + j] << 4);
        const uint16_t ends[] = {scale, least};
        std::memcpy(part + H * NR / 2 + c * 4, ends, 4);
    }
}

static void pack_panel(int kind, const float* w, int64_t inputs, const int32_t* order, int64_t p, uint8_t* data) {
    static thread_local std::vector<float> zeros;
    if ((int64_t)zeros.size() < inputs) zeros.assign(inputs, 0.0f);
    uint8_t* panel = data + p * panel_bytes(kind, inputs);
    for (int c = 0; c < NR; c++) {
        const int64_t row = order[p * NR + c];
        const float* x = row < 0 ? zeros.data() : w + row * inputs;
        if (kind == FLOAT32)
            for (int64_t k = 0; k < inputs; k++) ((float*)panel)[k * NR + c] = x[k];
        else if (kind == BFLOAT16)
            for (int64_t k = 0; k < inputs; k++) ((uint16_t*)panel)[k * NR + half_at(c)] = to_bfloat16(x[k]);
        else if (kind == INT8)
            pack_column_int8(x, inputs, panel, c);
        else
            pack_column_int4(x, inputs, panel, c);
    }
}

// The weights of one column as floats: an embedding that is kept as the output projection only.
static void unpack_column(const Linear& w, int64_t column, float* x) {
    const uint8_t* panel = w.data + column / NR * panel_bytes(w.kind, w.inputs);
    const int64_t c = column % NR;
    float scale = 0;
    if (w.kind == INT8) std::memcpy(&scale, panel + groups_of(w.inputs) * G * NR + c * 4, 4);
    for (int64_t k = 0; k < w.inputs; k++) {
        if (w.kind == FLOAT32) {
            x[k] = ((const float*)panel)[k * NR + c];
        } else if (w.kind == BFLOAT16) {
            x[k] = widened(((const uint16_t*)panel)[k * NR + half_at((int)c)]);
        } else if (w.kind == INT8) {
            x[k] = scale * (float)((int8_t)(panel[k / 4 * 4 * NR + c * 4 + k % 4] - OFFSET));
        } else {
            const uint8_t* part = panel + k / H * PART;
            const uint8_t byte = part[k % H / 8 * 4 * NR + c * 4 + k % 4];
            const uint16_t* ends = (const uint16_t*)(part + H * NR / 2);
            x[k] = widened(ends[2 * c + 1]) + widened(ends[2 * c]) * (float)(k % 8 < 4 ? byte & 15 : byte >> 4);
        }
    }
}
