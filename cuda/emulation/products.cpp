// Runs one product on the machine, on random data, and compares it with fp64: products NAME=VALUE … (see `Settings`). Compiled once for each
// kernel and its defines: -DKERNEL_SOURCE names the source, -DMMA, -DSTREAM, -DWGMMA or -DLARGE says which it is.
//
// Ends with 0 if every result is within a rounding, 1 if one is not or a rule of the machine is broken.
#include "harness.h"

namespace {

const float NF4[16] = {-1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                       -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                       0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f};
const float FP4[16] = {0.f, 0.0625f / 12, 8.f / 12, 1.f, 4.f / 12, 6.f / 12, 2.f / 12, 3.f / 12,
                       -0.f, -0.0625f / 12, -8.f / 12, -1.f, -4.f / 12, -6.f / 12, -2.f / 12, -3.f / 12};
// A code's values as the kernel takes them, four a word, and as they are then.
struct Code {
    const float* exact;
    float gain, table[16];
    u64 words[4] = {};
    explicit Code(bool fp4) : exact(fp4 ? FP4 : NF4) {
#ifdef LARGE
        constexpr bool INTEGERS = IS_F16, AS_BF16 = false;
#else
        constexpr bool INTEGERS = false, AS_BF16 = !IS_F16;
#endif
        gain = INTEGERS ? (fp4 ? 24576.f : 32767.f) : fp4 ? 12.f : AS_BF16 ? 1.43677f : 1.36621f;
        for (u32 i = 0; i < 16; ++i) {
            const float v = exact[i] * gain;
            const u16 bits = INTEGERS ? u16(std::lround(v) + 32768) : AS_BF16 ? machine::to_bf16(v) : machine::to_f16(v);
            table[i] = INTEGERS ? float(bits) - 32768.f : AS_BF16 ? machine::from_bf16(bits) : machine::from_f16(bits);
            words[i / 4] |= u64(bits) << i % 4 * 16;
        }
    }
};

// A weight [n, k] and what is to come of it: of a gated one, [2 · n, k], one output for two rows.
struct Matrix {
    static constexpr u32 MARGIN = 8, UNTOUCHED = 0x1234;
    u32 n, k, block, gate;
    bool is_nested;
    u8* packed;
    std::vector<u8> codes;
    std::vector<float> absmax, nested, map;
    float offset = 0.031f;
    std::vector<ELEMENT> bias;
    ELEMENT* out;  // with a margin on both sides

    // Scales begin `shift` entries further on, for alignments that are none.
    Matrix(u32 n, u32 k, u32 block, bool is_nested, u32 m, u32 shift, u32 gate)
        : n(n), k(k), block(block), gate(gate), is_nested(is_nested), shift(shift) {
        const size_t rows = gate ? 2 * n : n;
        packed = guarded<u8>(rows * k / 2);
        for (size_t i = 0; i < rows * k / 2; ++i) packed[i] = u8(generator());
        const size_t blocks = (rows * k + block - 1) / block;
        for (size_t i = 0; i < blocks + shift; ++i) {
            absmax.push_back(0.02f + 0.03f * float(generator() % 1000) / 1000.f);
            codes.push_back(u8(generator()));
        }
        for (size_t i = 0; i <= blocks >> 8; ++i) nested.push_back(0.01f + 0.01f * float(generator() % 100) / 100.f);
        for (int i = 0; i < 256; ++i) map.push_back(float(i - 127) / 127.f);
        for (size_t i = 0; i < rows; ++i) bias.push_back(element_of(normal() * 0.5f));
        out = guarded<ELEMENT>(size_t(m) * n + 2 * MARGIN);
        for (size_t i = 0; i < size_t(m) * n + 2 * MARGIN; ++i) out[i].bits = UNTOUCHED;
    }
    const void* scales() const { return is_nested ? static_cast<const void*>(codes.data() + shift) : absmax.data() + shift; }
    float scale(size_t i) const { return is_nested ? map[codes[i + shift]] * nested[i >> 8] + offset : absmax[i + shift]; }

    // The largest difference from fp64, as a part of what a rounding of the result and the order of sums account for.
    double worst(const ELEMENT* x, u32 m, const Code& code, bool biased) const {
        double largest = 0;
        // Gated results can be so small that fp16 has multiples of its least number only.
        const double rounding = (IS_F16 ? 0x1p-10 : 0x1p-7) * 0.51, least = IS_F16 ? 0x1p-25 : 1e-30;
        // Sums of a row with all tokens, and the sums of what is added in size.
        struct Sum {
            double value, size;
        };
        auto sums = [&](u32 row) {
            std::vector<double> weights(k);
            std::vector<Sum> of(m);
            for (u32 i = 0; i < k; ++i) {
                const size_t at = size_t(row) * k + i;
                const float value = code.table[at % 2 ? packed[at / 2] & 15 : packed[at / 2] >> 4], s = scale(at / block);
#ifdef LARGE
                weights[i] = to_float(element_of(value * (s * (1 / code.gain))));  // is rounded, as dequantizing does
#else
                weights[i] = double(value) / code.gain * s;
#endif
            }
            for (u32 token = 0; token < m; ++token) {
                of[token] = {biased ? to_float(bias[row]) : 0, 0};
                for (u32 i = 0; i < k; ++i) {
                    const double product = weights[i] * to_float(x[size_t(token) * k + i]);
                    of[token].value += product, of[token].size += std::abs(product);
                }
            }
            return of;
        };
        for (u32 row = 0; row < n; ++row) {
            const std::vector<Sum> values = sums(row), ups = gate ? sums(n + row) : values;
            for (u32 token = 0; token < m; ++token) {
                auto [sum, size] = values[token];
                if (gate) {
                    const auto [up, more] = ups[token];
                    // Neither function is steeper than 1.13.
                    const double z = gate == 1 ? sum : 2 * std::sqrt(2 / M_PI) * (sum + 0.044715 * sum * sum * sum), a = sum / (1 + std::exp(-z));
                    size = 1.13 * size * std::abs(up) + std::abs(a) * (more + std::abs(up) * 0.1), sum = a * up;
                }
                const double got = to_float(out[MARGIN + size_t(token) * n + row]);
                const double error = std::abs(got - sum) / (std::abs(sum) * rounding + size * 1e-5 + least);
                if (!(error <= largest)) largest = error;
            }
        }
        for (u32 i = 0; i < MARGIN; ++i)
            if (out[i].bits != UNTOUCHED || out[MARGIN + size_t(m) * n + i].bits != UNTOUCHED) machine::fail("something is written outside of the result");
        return largest;
    }

private:
    u32 shift;
};

#if defined(WGMMA) || defined(LARGE)
// Scratch memory for tiles that blocks share, full of anything.
Split split_of(u32 blocks, u32 numbers, u32 shared) {
    Split split{guarded<float>(size_t(blocks) * numbers), guarded<u64>(blocks), 0x123456789abcdef, shared, 0};
    for (size_t i = 0; i < size_t(blocks) * numbers; ++i) split.sums[i] = NAN;
    for (u32 i = 0; i < blocks; ++i) split.flags[i] = generator();
    return split;
}
void check_flags(const Split& split, u32 blocks) {
    for (u32 i = 0; i < blocks; ++i)
        if (split.flags[i] == split.raised) machine::fail("a flag is left raised");
}
#endif

template <class P> void fill(P& to, const Matrix& matrix) {
    to.absmax = matrix.scales();
    to.nested = matrix.is_nested ? matrix.nested.data() : nullptr;
    to.map = matrix.map.data();
    to.offset = &matrix.offset;
}

}  // namespace

int main(int count, char** arguments) {
    const Settings settings(count, arguments);
    const u32 m = settings.get("m", 8), k = settings.get("k", 1024), block = settings.get("block", 64), seed = settings.get("seed", 1);
    const bool biased = settings.get("bias", 1);
    generator.seed(seed);
    const Code code(settings.get("fp4", 0));
    ELEMENT* const x = guarded<ELEMENT>(size_t(m) * k);
    for (size_t i = 0; i < size_t(m) * k; ++i) x[i] = element_of(normal());
    const u32 gate = settings.get("gate", 0);
    std::vector<Matrix> matrices;
    const std::vector<u32> rows = settings.list("n");
    matrices.reserve(rows.size());
    for (const u32 n : rows) matrices.emplace_back(n, k, block, settings.get("nested", 0), m, settings.get("shift", 0), gate);

    machine::Launch launch = {settings.get("threads", 384), settings.get("cluster", 1), settings.get("blocks_x", 1), settings.get("blocks_y", 1),
                              settings.get("registers", 168), settings.get("shared", 0)};
    const machine::Weather weather = {seed * 7 + 1, settings.get("lateness", 40)};
    const u32 log2_block = __builtin_ctz(block), nested_shift = 8;
    const float ungain = 1 / code.gain;
    const u64* const v = code.words;
#if defined(MMA)
    const Matrix& matrix = matrices[0];
    const u32 tiles = settings.get("tiles", 1), tiles_per_pass = settings.get("tiles_per_pass", 1);
    auto multiply = [&](auto kernel) {
        kernel(x, matrix.packed, matrix.scales(), matrix.nested.data(), matrix.map.data(), &matrix.offset, nested_shift,
               biased ? matrix.bias.data() : nullptr, matrix.out + Matrix::MARGIN, m, matrix.n, k, log2_block, v[0], v[1], v[2], v[3], ungain, tiles,
               tiles_per_pass);
    };
    machine::run(launch, weather, [&] {
#if TOKENS == 8
        matrix.is_nested ? multiply(matmul_4bit_mma_nested_m8) : multiply(matmul_4bit_mma_plain_m8);
#else
        matrix.is_nested ? multiply(matmul_4bit_mma_nested_m16) : multiply(matmul_4bit_mma_plain_m16);
#endif
    });
#elif defined(STREAM)
    const u32 tiles = settings.get("tiles", 1);
    Pieces pieces{};
    u32 first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
        Piece& piece = pieces.list[i];
        piece.weight.packed = matrices[i].packed;
        fill(piece.weight, matrices[i]);
        piece.bias = biased ? matrices[i].bias.data() : nullptr;
        piece.out = matrices[i].out + Matrix::MARGIN;
        piece.N = matrices[i].n;
        piece.first = first;
        first += ((matrices[i].n + 15) / 16 * (gate ? 2 : 1) + tiles - 1) / tiles;
    }
    launch.blocks_x = first * launch.cluster;
    // What it is told to fetch for the next launch, in matmul_next.rs's words: of some rows the begin, of some all.
    Next next{};
    std::vector<const u8*> expected;
    for (u32 i = 0; i < seed % 3; ++i) {
        NextRows& some = next.list[i];
        some = {reinterpret_cast<const u8*>(x) + i, 1 + seed * 37 % 71 * (i + 1), 64u << seed % 6, 32 * (1 + seed % (2u << seed % 6)), 0};
        while (128u << some.log2_lanes < some.bytes && some.log2_lanes < 5) ++some.log2_lanes;
        for (u32 row = 0; row < some.rows; ++row)
            for (u32 at = 0; at < some.bytes; at += 128) expected.push_back(some.base + u64(row) * some.stride + at);
    }
    machine::run(launch, weather, [&] {
        matmul_4bit_stream(x, m, k, log2_block, nested_shift, v[0], v[1], v[2], v[3], ungain, tiles, u32(matrices.size()), gate,
                           settings.get("settled", 0), pieces, next);
    });
    std::sort(expected.begin(), expected.end()), std::sort(machine::fetched.begin(), machine::fetched.end());
    if (expected != machine::fetched) machine::fail("not what was to be fetched for the next launch");
#else
    Problem problem{};
    fill(problem, matrices[0]);
    problem.bias = biased ? matrices[0].bias.data() : nullptr;
    problem.out = matrices[0].out + Matrix::MARGIN;
    problem.M = m, problem.N = rows[0], problem.K = k;
    problem.log2_block = log2_block, problem.nested_shift = nested_shift, problem.ungain = ungain;
    const TensorMap x_map = {x, k, m, 2, TOKENS};
#ifdef WGMMA
    const u32 tile = settings.get("rows", 128);
    const TensorMap weights = {matrices[0].packed, k / 2, rows[0], 1, tile};
    problem.split = split_of(launch.blocks_x, tile * TOKENS, settings.get("line", 0));
    machine::run(launch, weather, [&] {
        if (tile == 192) return matmul_4bit_wgmma_r192(weights, x_map, v[0], v[1], v[2], v[3], problem);
        matmul_4bit_wgmma_r128(weights, x_map, v[0], v[1], v[2], v[3], problem);
    });
    check_flags(problem.split, launch.blocks_x);
#else
    problem.packed = matrices[0].packed;
    problem.group = settings.get("group", 8);
    problem.split = split_of(launch.blocks_x, ROWS * TOKENS, settings.get("line", 0));
    machine::run(launch, weather, [&] { matmul_4bit_large(x_map, v[0], v[1], v[2], v[3], problem); });
    check_flags(problem.split, launch.blocks_x);
#endif
#endif
    double worst = 0;
    for (const Matrix& matrix : matrices) {
        const double error = matrix.worst(x, m, code, biased);
        if (!(error <= worst)) worst = error;
    }
    std::printf("%s: %.3f of a rounding\n", worst <= 1 ? "right" : "FAIL", worst);
    return worst <= 1 ? 0 : 1;
}
