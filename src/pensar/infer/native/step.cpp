// One step of the engine: a ragged batch through all layers in one call, phases shared out among a team of threads.
#include "model.h"
#include "weigh.h"

#include <algorithm>
#include <memory>

namespace {

struct Item {  // a tile of attention: `num` tokens of a row from `first` on, one key-value head, heads of its group
    int64_t row, first, num, kv_head, head, heads;
};

using Floats = std::vector<float>;

struct Step {
    Step(const Model& model, const Batch& batch, Team& team) : m(model), b(batch), team(team), n(batch.tokens) {
        const int64_t h = m.head_dim;
        attended = m.heads * h;
        heads_wide = attended + 2 * m.kv_heads * h;
        copies = m.experts ? m.chosen : 1;
        const int64_t most = std::max({m.hidden, attended, m.width});
        x.resize(n * m.hidden);
        normed.resize(n * m.hidden);
        qkv.resize(n * heads_wide);
        out.resize(n * attended);
        middle.resize(n * copies * m.width);
        bytes.resize(n * copies * groups_of(most));
        if (m.experts) {
            scores.resize(n * m.experts);
            routed.resize(n * copies * m.hidden);
            expert.resize(n * copies);
            weight.resize(n * copies);
            place.resize(n * copies);
            token.resize(n * copies);
            begins.resize(m.experts + 1);
        }
        share_out_attention();
        share_out_adapters();
    }

    void run() {
        team.each(n, [&](int64_t i) { embed(b.ids[i], x.data() + i * m.hidden); });
        for (int64_t l = 0; l < m.num_layers; l++) layer(l);
        const int64_t d = m.hidden;
        team.each(n, [&](int64_t i) {
            rms_norm(x.data() + i * d, m.final_norm, d, (float)m.eps, b.hidden + i * d);
            if (m.head.kind >= INT8 && b.logits != nullptr) to_bytes_at(b.hidden, d, i);
        });
        if (b.logits != nullptr)
            product(team, m.head, rows_of(b.hidden, d), n, Sink{Sink::STORE, b.logits, m.vocab, m.vocab});
    }

  private:
    const Model& m;
    const Batch& b;
    Team& team;
    int64_t n, attended, heads_wide, copies;
    Floats x, normed, qkv, out, middle, scores, routed, weight, change, low;
    std::vector<Group> bytes;
    std::vector<int64_t> expert, place, token, begins, adapter, work;  // adapter: of each token
    std::vector<std::vector<int64_t>> tokens_of;                      // of each adapter
    std::vector<Item> items;
    std::vector<const float*> gains;

    Rows rows_of(const float* values, int64_t inputs) const {
        return Rows{values, bytes.data(), inputs};
    }

    void to_bytes_at(const float* values, int64_t inputs, int64_t i) {
        to_bytes(values + i * inputs, inputs, &bytes[i * groups_of(inputs)]);
    }

    void all_to_bytes(const Linear& w, const float* values, int64_t num) {
        if (w.kind >= INT8) team.each(num, [&](int64_t i) { to_bytes_at(values, w.inputs, i); });
    }

    void embed(int64_t id, float* to) const {
        const int64_t d = m.hidden;
        if (m.embedding == nullptr)
            unpack_column(m.head, id, to);
        else if (m.embedding_kind == FLOAT32)
            std::memcpy(to, (const float*)m.embedding + id * d, d * sizeof(float));
        else
            for (int64_t i = 0; i < d; i++) to[i] = widened(((const uint16_t*)m.embedding)[id * d + i]);
    }

    void layer(int64_t l) {
        const Layer& w = m.layers[l];
        const int64_t d = m.hidden;
        norm(w.input_norm, w.qkv);
        apply(l, QKV, w.qkv, normed.data(), Sink{Sink::STORE, qkv.data(), heads_wide, heads_wide});
        const uint8_t* store = m.store + l * m.pages * m.page_bytes;
        team.each(n, [&](int64_t i) { rotate_and_keep(w, i, (uint8_t*)store); });
        team.each((int64_t)items.size(), [&](int64_t i) { attend_item(items[i], store); });
        if (l == m.num_layers - 1) only_wanted();
        all_to_bytes(w.o, out.data(), n);
        apply(l, O, w.o, out.data(), Sink{Sink::ADD, x.data(), d, d});
        norm(w.post_norm, m.experts ? w.expert_gate_up[0] : w.gate_up);
        if (m.experts) return mixture(w);
        apply(l, GATE_UP, w.gate_up, normed.data(), Sink{Sink::SWIGLU, middle.data(), m.width, m.width});
        all_to_bytes(w.down, middle.data(), n);
        apply(l, DOWN, w.down, middle.data(), Sink{Sink::ADD, x.data(), d, d});
    }

    void norm(const float* by, const Linear& next) {
        const int64_t d = m.hidden;
        team.each(n, [&](int64_t i) {
            rms_norm(x.data() + i * d, by, d, (float)m.eps, normed.data() + i * d);
            if (next.kind >= INT8) to_bytes_at(normed.data(), d, i);
        });
    }

    // The product, and before it what adapters add to their rows' results.
    void apply(int64_t l, Place at, const Linear& w, const float* values, Sink sink) {
        bool changed = false;
        for (size_t a = 0; a < tokens_of.size(); a++) {
            const auto& index = tokens_of[a];
            if (index.empty()) continue;
            const Change& by = m.layers[l].changes[a * PLACES + at];
            changed = true;
            const int64_t num = index.size(), rank = by.a.outputs, columns = (int64_t)w.panels * NR;
            if (by.a.data == nullptr) {
                team.each(num, [&](int64_t i) { std::fill_n(change.data() + index[i] * columns, columns, 0.0f); });
                continue;
            }
            Rows from{values, nullptr, w.inputs}, between{low.data(), nullptr, rank};
            team.each(by.a.panels, [&](int64_t p) {
                panel_product(by.a, p, from, index.data(), num, Sink{Sink::STORE, low.data(), rank, rank});
            });
            team.each(by.b.panels, [&](int64_t p) {
                Sink apart{Sink::STORE, change.data(), columns, columns};
                apart.to = index.data();
                panel_product(by.b, p, between, nullptr, num, apart);
            });
        }
        if (changed) {
            sink.change = change.data(), sink.change_stride = (int64_t)w.panels * NR;
            sink.adapters = adapter.data(), sink.gains = &gains[(l * PLACES + at) * m.adapters];
        }
        product(team, w, rows_of(values, w.inputs), n, sink);
    }

    void rotate_and_keep(const Layer& w, int64_t i, uint8_t* store) {
        const int64_t h = m.head_dim, row = work[i];
        const float *cosine = m.cosine + b.positions[i] * (h / 2), *sine = m.sine + b.positions[i] * (h / 2);
        float* q = qkv.data() + i * heads_wide;
        const float scale = 1 / std::sqrt((float)h);
        for (int64_t head = 0; head < m.heads + m.kv_heads; head++) {
            float* vector = q + head * h;
            rms_norm(vector, head < m.heads ? w.q_norm : w.k_norm, h, (float)m.eps, vector);
            rotate(vector, cosine, sine, h);
            if (head < m.heads)
                for (int64_t d = 0; d < h; d++) vector[d] *= scale;
        }
        const int64_t slot = b.lengths[row] - b.starts[row + 1] + i, size = head_bytes((int)m.cache, h);
        uint8_t* page = store + b.page_numbers[row * b.width + slot / PAGE] * m.page_bytes;
        const float *key = q + attended, *value = key + m.kv_heads * h;
        for (int64_t k = 0; k < m.kv_heads; k++)
            keep((int)m.cache, key + k * h, value + k * h, h, (int)(slot % PAGE), page + k * size);
    }

    void share_out_attention() {
        const int64_t group = m.heads / m.kv_heads;
        work.resize(n);
        for (int64_t r = 0; r < b.rows; r++) {
            for (int64_t i = b.starts[r]; i < b.starts[r + 1]; i++) work[i] = r;
            for (int64_t k = 0; k < m.kv_heads; k++)
                for (int64_t head = 0; head < group; head += TILE) {
                    const int64_t heads = std::min<int64_t>(TILE, group - head), tokens = TILE / heads;
                    for (int64_t first = b.starts[r]; first < b.starts[r + 1]; first += tokens)
                        items.push_back({r, first, std::min(tokens, b.starts[r + 1] - first), k, k * group + head, heads});
                }
        }
    }

    void attend_item(const Item& item, const uint8_t* store) {
        const int64_t h = m.head_dim, size = head_bytes((int)m.cache, h);
        const Pages pages{store, b.page_numbers + item.row * b.width, m.page_bytes, item.kv_head * size,
                          (b.lengths[item.row] + PAGE - 1) / PAGE};
        const float* q[TILE];
        float* to[TILE];
        int64_t limits[TILE];
        int num = 0;
        for (int64_t i = item.first; i < item.first + item.num; i++)
            for (int64_t head = item.head; head < item.head + item.heads; head++, num++) {
                q[num] = qkv.data() + i * heads_wide + head * h;
                to[num] = out.data() + i * attended + head * h;
                limits[num] = b.lengths[item.row] - b.starts[item.row + 1] + i + 1;
            }
        attend((int)m.cache, num, q, limits, pages, h, to);
    }

    // After the last attention only rows whose logits are asked for go on, moved to the front.
    void only_wanted() {
        if (b.wanted == b.tokens) return;  // not by `n`, which another thread may have changed already
        const int64_t d = m.hidden;
        // Each thread would move the same rows: one does, the others wait.
        team.each(1, [&](int64_t) {
            for (int64_t s = 0; s < b.wanted; s++) {
                const int64_t i = b.wanted_at[s];
                std::copy_n(x.data() + i * d, d, x.data() + s * d);
                std::copy_n(out.data() + i * attended, attended, out.data() + s * attended);
            }
            n = b.wanted;
            share_out_adapters();
        });
    }

    void share_out_adapters() {
        if (b.adapters == nullptr || m.adapters == 0) return;
        tokens_of.assign(m.adapters, {});
        gains.resize(m.num_layers * PLACES * m.adapters);
        adapter.resize(n);
        int64_t columns = 0, rank = 0;
        for (int64_t i = 0; i < n; i++) {
            adapter[i] = b.adapters[work[n == b.tokens ? i : b.wanted_at[i]]];
            if (adapter[i] >= 0) tokens_of[adapter[i]].push_back(i);
        }
        for (int64_t l = 0; l < m.num_layers; l++) {
            const Layer& w = m.layers[l];
            for (const Linear* linear : {&w.qkv, &w.o, &w.gate_up, &w.down})
                columns = std::max<int64_t>(columns, (int64_t)linear->panels * NR);
            for (int64_t i = 0; i < m.adapters * PLACES; i++) rank = std::max<int64_t>(rank, w.changes[i].a.outputs);
            for (int64_t at = 0; at < PLACES; at++)
                for (int64_t a = 0; a < m.adapters; a++)
                    gains[(l * PLACES + at) * m.adapters + a] = w.changes[a * PLACES + at].gain;
        }
        change.resize(n * columns);
        low.resize(n * rank);
    }

    // Router in float32, the best experts by weight (of equal ones the first), then products expert by expert; a token's
    // sum runs over its experts in their order.
    void mixture(const Layer& w) {
        const int64_t d = m.hidden, k = m.chosen;
        product(team, w.router, Rows{normed.data(), nullptr, d}, n,
                Sink{Sink::STORE, scores.data(), m.experts, m.experts});
        team.each(n, [&](int64_t i) { choose(i); });
        team.each(1, [&](int64_t) { sort_by_expert(); });
        const Linear &first = w.expert_gate_up[0], &second = w.expert_down[0];
        const Rows from = rows_of(normed.data(), d), between = rows_of(middle.data(), m.width);
        team.each(m.experts * first.panels, [&](int64_t item) {
            const int64_t e = item / first.panels, begin = begins[e];
            panel_product(w.expert_gate_up[e], item % first.panels, from, token.data() + begin, begins[e + 1] - begin,
                          Sink{Sink::SWIGLU, middle.data() + begin * m.width, m.width, m.width});
        });
        all_to_bytes(second, middle.data(), n * k);
        team.each(m.experts * second.panels, [&](int64_t item) {
            const int64_t e = item / second.panels, begin = begins[e];
            panel_product(w.expert_down[e], item % second.panels, between, nullptr, begins[e + 1] - begin,
                          Sink{Sink::STORE, routed.data(), d, d}, begin);
        });
        team.each(n, [&](int64_t i) {
            for (int64_t c = 0; c < d; c++) {
                float total = 0;
                for (int64_t j = 0; j < k; j++) total += weight[i * k + j] * routed[place[i * k + j] * d + c];
                x[i * d + c] += total;
            }
        });
    }

    // Experts of token i in ascending order, with their weights.
    void choose(int64_t i) {
        float* p = scores.data() + i * m.experts;
        float top = p[0], total = 0, kept = 0;
        for (int64_t e = 1; e < m.experts; e++) top = std::fmax(top, p[e]);
        for (int64_t e = 0; e < m.experts; e++) total += p[e] = exp(splat(p[e] - top))[0];
        int64_t* mine = expert.data() + i * m.chosen;
        for (int64_t j = 0; j < m.chosen; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < m.experts; e++)
                if (std::find(mine, mine + j, e) == mine + j && (best < 0 || p[e] > p[best])) best = e;
            mine[j] = best;
            kept += p[best] / total;
        }
        std::sort(mine, mine + m.chosen);
        for (int64_t j = 0; j < m.chosen; j++)
            weight[i * m.chosen + j] = p[mine[j]] / total / (m.norm_chosen ? kept : 1.0f);
    }

    void sort_by_expert() {
        const int64_t num = n * m.chosen;
        std::fill(begins.begin(), begins.end(), 0);
        for (int64_t a = 0; a < num; a++) begins[expert[a] + 1]++;
        for (int64_t e = 0; e < m.experts; e++) begins[e + 1] += begins[e];
        std::vector<int64_t> next(begins.begin(), begins.end() - 1);
        for (int64_t a = 0; a < num; a++) {
            place[a] = next[expert[a]]++;
            token[place[a]] = a / m.chosen;
        }
    }
};

// The number of the first thing that a batch may not hold, 0 if it is sound: nothing outside is read or written.
int64_t fault_of(const Model& m, const Batch& b) {
    for (int64_t i = 0; i < b.tokens; i++) {
        if (b.ids[i] < 0 || b.ids[i] >= m.vocab) return 1;
        if (b.positions[i] < 0 || b.positions[i] >= m.positions) return 2;
    }
    for (int64_t r = 0; r < b.rows; r++) {
        const int64_t num = b.starts[r + 1] - b.starts[r], pages = (b.lengths[r] + PAGE - 1) / PAGE;
        if (num < 1 || num > b.lengths[r] || pages > b.width || b.starts[r + 1] > b.tokens) return 3;
        for (int64_t p = 0; p < pages; p++) {
            const int64_t page = b.page_numbers[r * b.width + p];
            if (page < 0 || page >= m.pages) return 4;
        }
        if (b.adapters != nullptr && b.adapters[r] >= m.adapters) return 5;
    }
    for (int64_t s = 0; s < b.wanted; s++)
        if (b.wanted_at[s] < (s ? b.wanted_at[s - 1] + 1 : 0) || b.wanted_at[s] >= b.tokens) return 6;
    return 0;
}

}  // namespace

extern "C" {

int64_t pensar_step(const Model* model, const Batch* batch, Team* team) {
    const int64_t fault = fault_of(*model, *batch);
    if (fault) return fault;
    Step step(*model, *batch, *team);
    team->run([&] { step.run(); });
    return 0;
}

Team* pensar_team(int64_t threads, int64_t pin) { return new Team((int)threads, pin != 0); }
void pensar_dismiss(Team* team) { delete team; }

int64_t pensar_columns() { return NR; }
int64_t pensar_panel_bytes(int64_t kind, int64_t inputs) { return panel_bytes((int)kind, inputs); }
int64_t pensar_head_bytes(int64_t cache, int64_t head_dim) { return head_bytes((int)cache, head_dim); }

const char* pensar_units() {
#if defined(PENSAR_GENERIC)
    return "generic";
#elif defined(__AVX512VNNI__)
    return "avx512 vnni";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVXVNNI__)
    return "avx2 vnni";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "neon dot product";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "portable vectors";
#endif
}

void pensar_pack(
    int64_t kind, const float* w, int64_t inputs, const int32_t* order, int64_t panels, uint8_t* data, Team* team
) {
    team->run([&] { team->each(panels, [&](int64_t p) { pack_panel((int)kind, w, inputs, order, p, data); }); });
}

void pensar_unpack(const Linear* w, const int64_t* columns, int64_t num, float* out) {
    for (int64_t i = 0; i < num; i++) unpack_column(*w, columns[i], out + i * w->inputs);
}

void pensar_linear(const Linear* w, const float* x, int64_t num, float* out, Team* team) {
    const int64_t groups = groups_of(w->inputs);
    std::vector<Group> bytes(w->kind >= INT8 ? num * groups : 0);
    const Rows rows{x, bytes.data(), w->inputs};
    team->run([&] {
        if (w->kind >= INT8)
            team->each(num, [&](int64_t i) { to_bytes(x + i * w->inputs, w->inputs, &bytes[i * groups]); });
        product(*team, *w, rows, num, Sink{Sink::STORE, out, w->outputs, w->outputs});
    });
}

// Operations of independent products in registers, `rounds` times: what the units give where nothing else is done.
int64_t pensar_peak(int64_t kind, int64_t rounds) {
    constexpr int CHAINS = 12;
    Vf floats[CHAINS], a = splat((float)rounds * 1e-9f);
    Vi wholes[CHAINS];
    for (int c = 0; c < CHAINS; c++) floats[c] = splat((float)c), wholes[c] = splat(c);
    const Vb w = load<Vb>(&a);
    for (int64_t i = 0; i < rounds; i++) {
        if (kind >= INT8)
            UNROLL for (int c = 0; c < CHAINS; c++) wholes[c] = dot(wholes[c], w, (int32_t)rounds);
        else
            UNROLL for (int c = 0; c < CHAINS; c++) floats[c] = fma(floats[c], a, a);
    }
    static volatile float kept;
    for (int c = 0; c < CHAINS; c++) kept = floats[c][0] + (float)wholes[c][0];
    return rounds * CHAINS * L * (kind >= INT8 ? 8 : 2);
}

// The sum of all words: how fast memory can be read.
int64_t pensar_read(const uint8_t* from, int64_t bytes) {
    Vi sums[4] = {};
    for (int64_t i = 0; i + 16 * L <= bytes; i += 16 * L) {
        UNROLL for (int v = 0; v < 4; v++) sums[v] += load<Vi>(from + i + v * 4 * L);
    }
    const Vi all = sums[0] + sums[1] + sums[2] + sums[3];
    int64_t total = 0;
    for (int i = 0; i < L; i++) total += all[i];
    return total;
}

// Of each row one draw, its largest score and the sum of its weights; `temperature` may be null for 1, and `uniform` for
// the likeliest token in place of a draw.
void pensar_weigh(
    const float* x, int64_t rows, int64_t vocabulary, const float* temperature, const float* uniform, int64_t* ids,
    float* top, float* total, Team* team
) {
    team->run([&] {
        team->each(rows, [&](int64_t i) {
            const float* row = x + i * vocabulary;
            const float degree = temperature == nullptr ? 1.0f : temperature[i];
            const Weighed drawn =
                uniform == nullptr ? largest(row, vocabulary) : weigh(row, vocabulary, degree, uniform[i]);
            ids[i] = drawn.id, top[i] = drawn.top, total[i] = drawn.total;
        });
    });
}

void pensar_exp(const float* x, int64_t num, float* y) {
    for (int64_t i = 0; i < num; i++) y[i] = exp(splat(x[i]))[0];
}

void pensar_norm(const float* x, const float* weight, int64_t rows, int64_t num, double eps, float* y) {
    for (int64_t i = 0; i < rows; i++) rms_norm(x + i * num, weight, num, (float)eps, y + i * num);
}
}
