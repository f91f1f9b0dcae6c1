// Runs one product of int8 codes (int8_wgmma.cu) on the machine and compares it with fp64: int8 NAME=VALUE …
//
// Ends with 0 if every result is within a rounding, 1 if one is not or a rule of the machine is broken.
#include "harness.h"

int main(int count, char** arguments) {
    const Settings settings(count, arguments);
    const u32 m = settings.get("m", 16), n = settings.get("n", 64), k = settings.get("k", 128), seed = settings.get("seed", 1);
    const u32 rows = settings.get("rows", 64), stages = settings.get("stages", 4), most = settings.get("most", 32);
    const u32 columns = std::min(settings.get("columns", 0), k);
    constexpr float THRESHOLD = 6.f;
    constexpr u32 MARGIN = 8, UNTOUCHED = 0x1234;
    generator.seed(seed);

    ELEMENT* const x = guarded<ELEMENT>(size_t(m) * k);
    u8 *const q = guarded<u8>(size_t(m) * k), *const w = guarded<u8>(size_t(n) * k);
    float *const row_stats = guarded<float>(m), *const column_stats = guarded<float>(n);
    ELEMENT* const bias = guarded<ELEMENT>(n);
    u32* const bitmap = guarded<u32>((k + 31) / 32);
    ELEMENT* const out = guarded<ELEMENT>(size_t(m) * n + 2 * MARGIN);
    for (size_t i = 0; i < size_t(m) * n + 2 * MARGIN; ++i) out[i].bits = UNTOUCHED;
    for (size_t i = 0; i < size_t(m) * k; ++i) x[i] = element_of(std::clamp(normal(), -5.f, 5.f));
    std::vector<u32> order(k);
    for (u32 i = 0; i < k; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (u32 c = 0; c < columns; ++c) {
        x[size_t(generator() % m) * k + order[c]] = element_of(9.f + float(c % 7));
        bitmap[order[c] / 32] |= 1u << order[c] % 32;
    }
    for (u32 row = 0; row < m; ++row) {
        float largest = 0;
        auto value = [&](u32 i) { return to_float(x[size_t(row) * k + i]); };
        for (u32 i = 0; i < k; ++i)
            if (std::abs(value(i)) < THRESHOLD) largest = std::max(largest, std::abs(value(i)));
        row_stats[row] = largest;
        for (u32 i = 0; i < k; ++i) {
            const bool in = std::abs(value(i)) < THRESHOLD && largest > 0;
            q[size_t(row) * k + i] = in ? u8(i32(std::nearbyint(value(i) * 127 / largest))) : u8(0);
        }
    }
    for (size_t i = 0; i < size_t(n) * k; ++i) w[i] = u8(generator());
    for (u32 i = 0; i < n; ++i) column_stats[i] = 0.5f + float(generator() % 100) / 100.f, bias[i] = element_of(normal());

    const TensorMap w_map = {w, k, n, 1, rows}, q_map = {q, k, m, 1, TOKENS}, x_map = {x, k, m, 2, TOKENS};
    const u32 behind = 128 * 32 + TOKENS * 32 + 2 * std::min(TOKENS, 64) * 128 + 2 * TOKENS * 4 + 512 * 4;
    const u32 cluster = settings.get("cluster", 1), groups = rows > 64 ? 2 : 1, parts = cluster > 1 ? groups * TOKENS * 256 : 0;
    const u32 shared = stages * (rows + TOKENS) * 128 + behind + parts + 1024;
    const machine::Launch launch = {(groups + 1) * 128, cluster, settings.get("blocks", 1) * cluster, 1, 168, shared};
    const bool any = settings.get("threshold", 1), counted = any && settings.get("counted", 1);
    u32* const marked = guarded<u32>(1);
    *marked = columns;
    machine::run(launch, {seed * 7 + 1, settings.get("lateness", 40)}, [&] {
        matmul_int8(w_map, q_map, x_map, row_stats, column_stats, bias, out + MARGIN, x, q, w, any ? bitmap : nullptr,
                    counted ? marked : nullptr, m, n, k, rows, stages, std::max(2048 / TOKENS, 1), most);
    });

    const bool itself = counted && columns > most;  // x is multiplied, not its codes
    double worst = 0;
    for (u32 row = 0; row < m; ++row) {
        for (u32 column = 0; column < n; ++column) {
            double sum = 0, size = 0;
            for (u32 i = 0; i < k; ++i) {
                const size_t at = size_t(row) * k + i;
                const bool exact = itself || (any && bitmap[i / 32] >> i % 32 & 1);
                const double value = exact ? to_float(x[at]) : double(static_cast<signed char>(q[at])) * row_stats[row] / 127;
                const double product = value * static_cast<signed char>(w[size_t(column) * k + i]);
                sum += product, size += std::abs(product);
            }
            const double scale = column_stats[column] / 127, wanted = sum * scale + to_float(bias[column]);
            const double got = to_float(out[MARGIN + size_t(row) * n + column]);
            const double error = std::abs(got - wanted) / (std::abs(wanted) * (IS_F16 ? 0x1p-11 : 0x1p-8) * 1.02 + size * scale * 1e-5);
            if (!(error <= worst)) worst = error;
        }
    }
    for (u32 i = 0; i < MARGIN; ++i)
        if (out[i].bits != UNTOUCHED || out[MARGIN + size_t(m) * n + i].bits != UNTOUCHED) machine::fail("something is written outside of the result");
    std::printf("%s: %.3f of a rounding\n", worst <= 1 ? "right" : "FAIL", worst);
    return worst <= 1 ? 0 : 1;
}
