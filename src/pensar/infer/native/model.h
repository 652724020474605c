// What Python hands over: a model's packed weights, its cache, a batch. Mirrored by structs.py field by field.
#pragma once

#include "attention.h"

enum Place { QKV = 0, O = 1, GATE_UP = 2, DOWN = 3, PLACES = 4 };

// One adapter's change of one product: rows times `a`, then times `b`, which holds the scale, and DoRA's gain of each
// column or null. No data: no change.
struct Change {
    Linear a, b;
    const float* gain;
};

struct Layer {
    const float *input_norm, *q_norm, *k_norm, *post_norm;
    Linear qkv, o, gate_up, down, router;
    const Linear *expert_gate_up, *expert_down;  // [experts], of a mixture
    const Change* changes;                       // [adapters, PLACES]
};

struct Model {
    int64_t vocab, hidden, num_layers, heads, kv_heads, head_dim, width, experts, chosen, norm_chosen, adapters;
    double eps;
    Linear head;
    const void* embedding;  // [vocab, hidden] in the type below; null: the head's columns
    int64_t embedding_kind;
    const float *final_norm, *cosine, *sine;  // tables [positions, head_dim / 2]
    int64_t positions;
    const Layer* layers;
    int64_t cache, pages, page_bytes;  // bytes of a page of one layer
    uint8_t* store;                    // [num_layers, pages, kv_heads, head_bytes]
};

struct Batch {
    int64_t rows, tokens, wanted, width;
    const int64_t *ids, *positions, *starts, *lengths, *page_numbers, *wanted_at, *adapters;
    float *logits, *hidden;  // null: no logits
};
