// The selective scan on CPU, forward and backward; see reference.py for what it computes.
//
// A task is one part of the channels of one group of one image. It walks along each of its rows in
// tiles of tokens whose states stay in the cache, each step of a tile in its own loop over
// [token][state], which the compiler turns into vector instructions. The state at the borders of
// tiles is kept for the backward pass, those inside are computed again. State in float32.
//
// B, C and their gradients are (batch, groups, L, N) here: the states of a token lie together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Problem {
    int64_t batch, channels, length, groups, states, tile, parts;
    bool has_softplus;
    const float *u, *delta, *A, *B, *C, *D, *bias;
};

// A row of a problem: one channel of one image.
struct Row {
    const float *u, *delta, *A, *B, *C;
    float skip, bias;
};

struct Gradients {
    float *u, *delta;          // (batch, D, L)
    float *A, *D, *bias;       // (batch, D, N), (batch, D), (batch, D)
    float *B, *C;              // (parts, batch, groups, L, N)
};

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x to 2 units in the last place, without a branch; x is held within [-87, 88].
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float n = std::rint(x * 1.44269504f);
    const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
    float p = 1.0f / 5040;
    p = multiply_add(p, r, 1.0f / 720);
    p = multiply_add(p, r, 1.0f / 120);
    p = multiply_add(p, r, 1.0f / 24);
    p = multiply_add(p, r, 1.0f / 6);
    p = multiply_add(p, r, 0.5f);
    p = multiply_add(p, r, 1.0f);
    p = multiply_add(p, r, 1.0f);
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// log(1 + e^x) to full relative precision: log1p(z) = 2 artanh(z / (2 + z)), z in (0, 1].
inline float softplus(float x) {
    const float z = exponential(-std::fabs(x));
    const float s = z / (2.0f + z), q = s * s;
    float p = 1.0f / 13;
    p = multiply_add(p, q, 1.0f / 11);
    p = multiply_add(p, q, 1.0f / 9);
    p = multiply_add(p, q, 1.0f / 7);
    p = multiply_add(p, q, 1.0f / 5);
    p = multiply_add(p, q, 1.0f / 3);
    p = multiply_add(p, q, 1.0f);
    return std::max(x, 0.0f) + 2.0f * s * p;
}

inline float sigmoid(float x) {
    const float z = exponential(-std::fabs(x));
    return (x >= 0.0f ? 1.0f : z) / (1.0f + z);
}

Row row_of(const Problem& p, int64_t image, int64_t group, int64_t channel) {
    const int64_t at = (image * p.channels + channel) * p.length;
    const int64_t matrix = (image * p.groups + group) * p.length * p.states;
    return {p.u + at,
            p.delta + at,
            p.A + channel * p.states,
            p.B + matrix,
            p.C + matrix,
            p.D ? p.D[channel] : 0.0f,
            p.bias ? p.bias[channel] : 0.0f};
}

// Step sizes of a tile.
void step_sizes(const Row& row, bool has_softplus, int64_t first, int64_t count, float* dt) {
    const float* delta = row.delta + first;
    const float bias = row.bias;
    if (has_softplus) {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) dt[t] = softplus(delta[t] + bias);
    } else {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) dt[t] = delta[t] + bias;
    }
}

// States of a tile, and their decays, from the state h that enters; h becomes the one that leaves.
template <int FIXED>
void run_tile(const Row& row, int64_t states, int64_t first, int64_t count, const float* dt,
              float* decay, float* state, float* h) {
    const int64_t N = FIXED ? FIXED : states;
    const float* u = row.u + first;
    const float* B = row.B + first * N;
    const float* A = row.A;
    if constexpr (FIXED == 1) {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) {
            decay[t] = exponential(dt[t] * A[0]);
            state[t] = dt[t] * u[t] * B[t];
        }
    } else {
        for (int64_t t = 0; t < count; ++t) {
            const float step = dt[t], input = dt[t] * u[t];
#pragma omp simd
            for (int64_t n = 0; n < N; ++n) {
                decay[t * N + n] = exponential(step * A[n]);
                state[t * N + n] = input * B[t * N + n];
            }
        }
    }
    const float* before = h;
    for (int64_t t = 0; t < count; ++t) {
        for (int64_t n = 0; n < N; ++n)
            state[t * N + n] = multiply_add(decay[t * N + n], before[n], state[t * N + n]);
        before = state + t * N;
    }
    std::copy(before, before + N, h);
}

template <int FIXED>
float dot(const float* a, const float* b, int64_t states) {
    const int64_t N = FIXED ? FIXED : states;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < N; ++n) sum += a[n] * b[n];
    return sum;
}

template <int FIXED>
void forward_row(const Problem& p, const Row& row, float* y, float* borders,
                 std::vector<float>& scratch) {
    const int64_t N = FIXED ? FIXED : p.states;
    float* dt = scratch.data();
    float* decay = dt + p.tile;
    float* state = decay + p.tile * N;
    float* h = state + p.tile * N;
    std::fill(h, h + N, 0.0f);
    for (int64_t first = 0; first < p.length; first += p.tile) {
        const int64_t count = std::min(p.tile, p.length - first);
        if (first > 0) borders = std::copy(h, h + N, borders);
        step_sizes(row, p.has_softplus, first, count, dt);
        run_tile<FIXED>(row, N, first, count, dt, decay, state, h);
        const float* C = row.C + first * N;
        const float* u = row.u + first;
        float* out = y + first;
#pragma omp simd
        for (int64_t t = 0; t < count; ++t)
            out[t] = dot<FIXED>(C + t * N, state + t * N, N) + row.skip * u[t];
    }
}

template <int FIXED>
void backward_row(const Problem& p, const Row& row, const float* grad_y, const float* borders,
                  float* grad_u, float* grad_delta, float* grad_A, float* grad_D, float* grad_bias,
                  float* grad_B, float* grad_C, std::vector<float>& scratch) {
    const int64_t N = FIXED ? FIXED : p.states;
    float* dt = scratch.data();
    float* for_input = dt + p.tile;
    float* for_dt = for_input + p.tile;
    float* decay = for_dt + p.tile;
    float* state = decay + p.tile * N;
    float* grad = state + p.tile * N;
    float* h = grad + p.tile * N;
    float* late = h + N;  // what later tokens want of the last state of the tile
    float sum_D = 0.0f, sum_bias = 0.0f;
    std::fill(late, late + N, 0.0f);
    std::fill(grad_A, grad_A + N, 0.0f);
    const int64_t last = (p.length - 1) / p.tile;
    for (int64_t tile = last; tile >= 0; --tile) {
        const int64_t first = tile * p.tile, count = std::min(p.tile, p.length - first);
        const float* u = row.u + first;
        const float* dy = grad_y + first;
        const float* B = row.B + first * N;
        const float* C = row.C + first * N;
        const float* A = row.A;
        float* for_B = grad_B + first * N;
        float* for_C = grad_C + first * N;
        if (tile > 0)
            std::copy(borders + (tile - 1) * N, borders + tile * N, h);
        else
            std::fill(h, h + N, 0.0f);
        step_sizes(row, p.has_softplus, first, count, dt);
        run_tile<FIXED>(row, N, first, count, dt, decay, state, h);

        const float* after = late;
        for (int64_t t = count - 1; t >= 0; --t) {
            for (int64_t n = 0; n < N; ++n)
                grad[t * N + n] = multiply_add(dy[t], C[t * N + n], after[n]);
            for (int64_t n = 0; n < N; ++n) h[n] = decay[t * N + n] * grad[t * N + n];
            after = h;
        }
        std::copy(h, h + N, late);

        if (tile > 0)
            std::copy(borders + (tile - 1) * N, borders + tile * N, h);
        else
            std::fill(h, h + N, 0.0f);
        if constexpr (FIXED == 1) {
            float sum_A = 0.0f;
            decay[0] *= h[0];
#pragma omp simd
            for (int64_t t = 1; t < count; ++t) decay[t] *= state[t - 1];
#pragma omp simd reduction(+ : sum_A)
            for (int64_t t = 0; t < count; ++t) {
                for_B[t] += grad[t] * dt[t] * u[t];
                for_C[t] += dy[t] * state[t];
                for_input[t] = grad[t] * B[t];
                const float exponent = grad[t] * decay[t];
                for_dt[t] = exponent * A[0];
                sum_A += exponent * dt[t];
            }
            grad_A[0] += sum_A;
        } else {
            const float* before = h;
            for (int64_t t = 0; t < count; ++t) {
                const float step = dt[t], input = dt[t] * u[t], out = dy[t];
                float sum_input = 0.0f, sum_dt = 0.0f;
#pragma omp simd reduction(+ : sum_input, sum_dt)
                for (int64_t n = 0; n < N; ++n) {
                    const float g = grad[t * N + n];
                    for_B[t * N + n] += g * input;
                    for_C[t * N + n] += out * state[t * N + n];
                    sum_input += g * B[t * N + n];
                    const float exponent = g * decay[t * N + n] * before[n];
                    sum_dt += exponent * A[n];
                    grad_A[n] += exponent * step;
                }
                for_input[t] = sum_input;
                for_dt[t] = sum_dt;
                before = state + t * N;
            }
        }

        float* to_u = grad_u + first;
        float* to_delta = grad_delta + first;
        const float* delta = row.delta + first;
        const bool has_softplus = p.has_softplus;
#pragma omp simd reduction(+ : sum_D, sum_bias)
        for (int64_t t = 0; t < count; ++t) {
            to_u[t] = for_input[t] * dt[t] + row.skip * dy[t];
            const float slope = has_softplus ? sigmoid(delta[t] + row.bias) : 1.0f;
            const float g = (for_dt[t] + for_input[t] * u[t]) * slope;
            to_delta[t] = g;
            sum_D += dy[t] * u[t];
            sum_bias += g;
        }
    }
    *grad_D = sum_D;
    *grad_bias = sum_bias;
}

// Calls run(image, group, channel, part, scratch) for all rows; a part's rows one after the other.
template <typename Run>
void for_all_rows(const Problem& p, int threads, int64_t scratch_size, Run run) {
    const int64_t size = p.channels / p.groups;
    const int64_t tasks = p.batch * p.groups * p.parts;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        std::vector<float> scratch(scratch_size);
        const int64_t part = task % p.parts, group = task / p.parts % p.groups;
        const int64_t image = task / (p.parts * p.groups);
        const int64_t begin = part * size / p.parts, end = (part + 1) * size / p.parts;
        for (int64_t channel = group * size + begin; channel < group * size + end; ++channel)
            run(image, group, channel, part, scratch);
    }
}

template <int FIXED>
void forward(const Problem& p, int threads, float* y, float* borders) {
    const int64_t kept = (p.length - 1) / p.tile * p.states;
    const int64_t scratch_size = p.tile * (1 + 2 * p.states) + p.states;
    for_all_rows(p, threads, scratch_size, [&](int64_t image, int64_t group, int64_t channel,
                                               int64_t, std::vector<float>& scratch) {
        const int64_t at = image * p.channels + channel;
        forward_row<FIXED>(p, row_of(p, image, group, channel), y + at * p.length,
                           borders + at * kept, scratch);
    });
}

template <int FIXED>
void backward(const Problem& p, int threads, const float* grad_y, const float* borders,
              const Gradients& g) {
    const int64_t kept = (p.length - 1) / p.tile * p.states;
    const int64_t scratch_size = p.tile * (3 + 3 * p.states) + 2 * p.states;
    for_all_rows(p, threads, scratch_size, [&](int64_t image, int64_t group, int64_t channel,
                                               int64_t part, std::vector<float>& scratch) {
        const int64_t at = image * p.channels + channel;
        const int64_t matrix =
            ((part * p.batch + image) * p.groups + group) * p.length * p.states;
        backward_row<FIXED>(p, row_of(p, image, group, channel), grad_y + at * p.length,
                            borders + at * kept, g.u + at * p.length, g.delta + at * p.length,
                            g.A + at * p.states, g.D + at, g.bias + at, g.B + matrix,
                            g.C + matrix, scratch);
    });
}

}  // namespace

// The states that networks use have loops of a length that the compiler knows.
#define CALL_FOR_STATES(function, ...)                      \
    switch (p.states) {                                     \
        case 1: return function<1>(__VA_ARGS__);            \
        case 8: return function<8>(__VA_ARGS__);            \
        case 16: return function<16>(__VA_ARGS__);          \
        case 64: return function<64>(__VA_ARGS__);          \
        default: return function<0>(__VA_ARGS__);           \
    }

// sizes: batch, channels, length, groups, states, tile, parts, has_softplus, threads.
// inputs: u, delta, A, B, C, D, bias (the last two may be null).
extern "C" void cmfs_scan_forward(const int64_t* sizes, const float* const* inputs, float* y,
                                  float* borders) {
    const Problem p{sizes[0],  sizes[1],  sizes[2],  sizes[3],  sizes[4],  sizes[5],  sizes[6],
                    sizes[7] != 0, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4],
                    inputs[5], inputs[6]};
    const int threads = static_cast<int>(sizes[8]);
    CALL_FOR_STATES(forward, p, threads, y, borders)
}

// gradients: u, delta, A, D, bias, B, C; those of B and C are added to.
extern "C" void cmfs_scan_backward(const int64_t* sizes, const float* const* inputs,
                                   const float* grad_y, const float* borders,
                                   float* const* gradients) {
    const Problem p{sizes[0],  sizes[1],  sizes[2],  sizes[3],  sizes[4],  sizes[5],  sizes[6],
                    sizes[7] != 0, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4],
                    inputs[5], inputs[6]};
    const int threads = static_cast<int>(sizes[8]);
    const Gradients g{gradients[0], gradients[1], gradients[2], gradients[3],
                      gradients[4], gradients[5], gradients[6]};
    CALL_FOR_STATES(backward, p, threads, grad_y, borders, g)
}
