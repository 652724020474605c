// What happens to one row: norms, bytes for the integer products, rotation of heads, the way into the cache.
#pragma once

#include "pack.h"

static void rms_norm(const float* x, const float* weight, int64_t num, float eps, float* y) {
    Vf squares = Vf{};
    int64_t i = 0;
    for (; i + L <= num; i += L) squares = fma(load<Vf>(x + i), load<Vf>(x + i), squares);
    float total = sum(squares);
    for (; i < num; i++) total += x[i] * x[i];
    const float factor = 1 / std::sqrt(total / (float)num + eps);
    for (i = 0; i + L <= num; i += L) store(y + i, load<Vf>(x + i) * factor * load<Vf>(weight + i));
    for (; i < num; i++) y[i] = x[i] * factor * weight[i];
}

// Bytes of a row, by the largest magnitude of each group. A group with NaN or infinity gets NaN as its scale.
static void to_bytes(const float* x, int64_t num, Group* to) {
    for (; num > 0; x += G, num -= G, to++) {
        alignas(64) float rest[G] = {};
        const float* from = x;
        if (num < G) {
            for (int64_t i = 0; i < num; i++) rest[i] = x[i];
            from = rest;
        }
        Vf largest = Vf{}, nothing = Vf{};
        for (int i = 0; i < G; i += L) {
            const Vf values = load<Vf>(from + i);
            largest = max(largest, abs(values));
            nothing += values * 0.0f;
        }
        const float scale = max(largest) / 127, inverse = scale > 0 ? 1 / scale : 0;
        to->scale = scale + sum(nothing);
        for (int part = 0; part < 2; part++) {
            Vi total = Vi{};
            for (int i = part * H; i < (part + 1) * H; i += L) {
                const Vi q = nearest(load<Vf>(from + i) * inverse);
                total += q;
                store(to->bytes + i, __builtin_convertvector(q, Vs));
            }
            int32_t lanes[L], all = 0;
            store(lanes, total);
            for (int i = 0; i < L; i++) all += lanes[i];
            to->sums[part] = all;
        }
        to->excess = OFFSET * (to->sums[0] + to->sums[1]);
    }
}

// (left, right) turned by the angles whose cosines and sines are given for the first half of the head.
static void rotate(float* x, const float* cosine, const float* sine, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float left = x[i], right = x[half + i];
        x[i] = left * cosine[i] - right * sine[i];
        x[half + i] = right * cosine[i] + left * sine[i];
    }
}

constexpr int PAGE = 16;

enum Cache : int32_t { CACHE_FLOAT32 = 0, CACHE_BFLOAT16 = 1, CACHE_INT8 = 2 };

INLINE int64_t wide(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Of one head and page: keys [h][PAGE], values [PAGE][wide(h)]; of int8 then the scales of keys and of values [PAGE].
INLINE int64_t head_bytes(int cache, int64_t head_dim) {
    const int64_t numbers = (head_dim + wide(head_dim)) * PAGE;
    return cache == CACHE_FLOAT32 ? numbers * 4 : cache == CACHE_BFLOAT16 ? numbers * 2 : numbers + PAGE * 8;
}

static void keep_bytes(const float* x, int64_t num, int64_t step, int8_t* out, float* scale) {
    float largest = 0, nothing = 0;
    for (int64_t i = 0; i < num; i++) largest = std::fmax(largest, std::fabs(x[i])), nothing += x[i] * 0.0f;
    *scale = largest / 127 + nothing;
    const float inverse = largest > 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < num; i++) out[i * step] = (int8_t)std::nearbyint(x[i] * inverse);
}

// Key and value of a token into place `slot` of its page.
static void keep(int cache, const float* key, const float* value, int64_t h, int slot, uint8_t* page) {
    const int64_t w = wide(h);
    if (cache == CACHE_FLOAT32) {
        float *keys = (float*)page, *values = keys + h * PAGE;
        for (int64_t i = 0; i < h; i++) keys[i * PAGE + slot] = key[i], values[slot * w + i] = value[i];
        for (int64_t i = h; i < w; i++) values[slot * w + i] = 0;
    } else if (cache == CACHE_BFLOAT16) {
        uint16_t *keys = (uint16_t*)page, *values = keys + h * PAGE;
        auto half = [](float x) { return x == x ? to_bfloat16(x) : (uint16_t)0x7fc0; };
        for (int64_t i = 0; i < h; i++) keys[i * PAGE + slot] = half(key[i]), values[slot * w + i] = half(value[i]);
        for (int64_t i = h; i < w; i++) values[slot * w + i] = 0;
    } else {
        int8_t *keys = (int8_t*)page, *values = keys + h * PAGE;
        float* scales = (float*)(values + PAGE * w);
        keep_bytes(key, h, PAGE, keys + slot, scales + slot);
        for (int64_t i = h; i < w; i++) values[slot * w + i] = 0;
        keep_bytes(value, h, 1, values + slot * w, scales + PAGE + slot);
    }
}
