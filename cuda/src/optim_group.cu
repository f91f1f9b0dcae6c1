// What a step over a group of parameters needs beside the rule: the table of pointers into device memory, the numbers of a step
// where step counts or the learning rate are on the device, and sums of squares that come out the same every time.
// From sm_75 on.
#include "optim.cuh"

// `Hyper` in rust/halfbyte/src/optim/hyper.rs.
struct Hyper {
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay, dampening, t_alpha, t_beta3, max_unorm, decoupled, bias_correction,
        nesterov, reserved[2];
};

enum Rule : u32 { ADAM, ADEMAMIX, LION, MOMENTUM, LARS, LAMB, RMSPROP, ADAGRAD };

// The numbers of step t: `Hyper::scalars`.
DEVICE Scalars scalars_of(const Hyper& h, u32 rule, double lr, double t) {
    auto correction = [&](double beta) { return h.bias_correction == 0 ? 1.0 : 1.0 - pow(beta, t); };
    double beta1 = h.beta1, rest1 = 1.0 - h.beta1, beta3 = h.beta3, rate = lr, rate2 = 0, eps = h.eps;
    if (h.t_beta3 > 0) {
        const double from = log(h.beta1), to = log(h.beta3), part = t / h.t_beta3;
        beta3 = fmin(exp(from * to / ((1.0 - part) * to + part * from)), h.beta3);
    }
    if (rule == ADAM || rule == LAMB || rule == ADEMAMIX) {
        const double root = sqrt(correction(h.beta2));
        rate2 = lr * root * (h.t_alpha > 0 ? fmin(t * h.alpha / h.t_alpha, h.alpha) : h.alpha);
        rate = lr * root / correction(h.beta1);
        eps = h.eps * root;
    } else if (rule == MOMENTUM || rule == LARS) {
        if (h.nesterov != 0) rate = lr * h.beta1, rate2 = lr;
        beta1 = t <= 1 ? 0 : h.beta1;
        rest1 = t <= 1 ? 1 : 1.0 - h.dampening;
    } else if (rule == ADAGRAD) {
        beta1 = 1;
    }
    const bool decoupled = h.decoupled != 0;
    Scalars k;
    k.beta1 = float(beta1), k.rest1 = float(rest1);
    k.beta2 = float(h.beta2), k.rest2 = float(1.0 - h.beta2);
    k.beta3 = float(beta3), k.rest3 = float(1.0 - beta3);
    k.rate = float(rate), k.rate2 = float(rate2), k.eps = float(eps);
    k.shrink = decoupled ? float(lr * h.weight_decay) : 0.f;
    k.l2 = decoupled ? 0.f : float(h.weight_decay);
    k.trust = float(lr * h.max_unorm), k.trust_eps = float(lr * h.eps);
    k.step = u32(t), k.lr = float(lr), k.reserved = 0;
    return k;
}

struct Words {
    u64 words[480];
};

// Part of a group's table. The words are in the launch itself, so that nothing has to stay where it is on the host, and a captured
// launch has them for good.
KERNEL __launch_bounds__(128) optim_upload(u64* to, u32 count, const __grid_constant__ Words from) {
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.words[i];
}

// Counts a step of every parameter that has a gradient, and makes its numbers.
KERNEL __launch_bounds__(128) optim_prepare(const Group group,
                                            const __grid_constant__ Hyper hyper,
                                            u32 rule,
                                            const float* lr,         // [1], or null: hyper.lr
                                            const float* found_inf,  // [1] or null
                                            Scalars* each) {         // [count]
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= group.count || group.grad(i) == nullptr || (found_inf != nullptr && *found_inf != 0.f)) return;
    float* step = group.at(i)->step;
    const float t = *step + 1.f;
    *step = t;
    each[i] = scalars_of(hyper, rule, lr == nullptr ? hyper.lr : double(*lr), double(t));
}

// Sums of squares of gradients, a block of 256 each: sums[block].x.
KERNEL __launch_bounds__(256) optim_squares(const Group group, float2* sums) {
    const u32 lane = threadIdx.x % WARP;
    const u32 blocks = group.start(group.count), warps = gridDim.x * (blockDim.x / WARP);
    Place place;
    for (u32 block = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP; block < blocks; block += warps) {
        place.seek(group, block, lane);
        const u8* grad = group.grad(place.which);
        float sum = 0.f;
        if (grad != nullptr) {
            const Parameter& at = *group.at(place.which);
            const u32 number = block - place.first;
            const Spot spot{number, lane, at.aligned() && number < u32(at.n / BLOCK), at.n};
            Raw raw;
            float g[8];
            raw.load(grad, at.grad_type(), spot);
            raw.get(at.grad_type(), g);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) sum += g[i] * g[i];
        }
        sum = warp_sum(sum);
        if (lane == 0) sums[block] = make_float2(sum, 0.f);
    }
}

// Adds blocks' sums to a few of each parameter. Grid: SLICES × parameters.
KERNEL __launch_bounds__(256) optim_reduce(const Group group, const float2* sums, double2* slices) {
    __shared__ double2 shared[8];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (u32 which = blockIdx.y; which < group.count; which += gridDim.y) {
        const u64 first = group.start(which), blocks = group.start(which + 1) - first;
        const u64 part = (blocks + SLICES - 1) / SLICES, from = min(blocks, part * blockIdx.x), to = min(blocks, from + part);
        double2 sum = make_double2(0, 0);
        for (u64 i = from + threadIdx.x; i < to; i += blockDim.x) {
            const float2 v = sums[first + i];
            sum.x += v.x;
            sum.y += v.y;
        }
        sum = make_double2(warp_sum(sum.x), warp_sum(sum.y));
        if (lane == 0) shared[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (u32 w = 1; w < 8; ++w) sum.x += shared[w].x, sum.y += shared[w].y;
            slices[u64(which) * SLICES + blockIdx.x] = sum;
        }
        __syncthreads();
    }
}

// Where a state wants it: the sum of squares of an update, at a learning rate of one. A warp a parameter.
KERNEL __launch_bounds__(128) optim_report(const Group group, const Scalars scalars, const Scalars* each, const double2* slices) {
    const u32 i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (i >= group.count || group.grad(i) == nullptr) return;
    float* to = group.at(i)->update_squares;
    if (to == nullptr) return;
    const double lr = each != nullptr ? each[i].lr : scalars.lr;
    const double sum = warp_sum(slices[u64(i) * SLICES + lane].y);
    if (lane == 0) *to = lr == 0 ? 0.f : float(sum / (lr * lr));
}

// Adds a group's sums of squares to a total, and takes the root at the end.
KERNEL __launch_bounds__(256) optim_total(const double2* slices, u64 count, double* total, u32 is_first, float* root) {
    __shared__ double shared[8];
    double sum = 0;
    for (u64 i = threadIdx.x; i < count; i += blockDim.x) sum += slices[i].x;
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = is_first ? 0 : *total;
        for (u32 w = 0; w < 8; ++w) sum += shared[w];
        *total = sum;
        if (root != nullptr) *root = float(sqrt(sum));
    }
}
