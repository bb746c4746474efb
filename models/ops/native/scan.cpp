// Selective scans on CPU, forward and backward: of sequences, and of maps in four directions.
//
// The plain references are ../selective_scan/reference.py and ../ss2d_scan/reference.py. A row (one
// channel of one image in one direction) is walked along in tiles of tokens whose states stay in the
// cache; each step of a tile is a loop of its own over [token][state], which the compiler turns into
// vector instructions. The state at the borders of tiles is kept for the backward pass, those inside
// are computed again. State in float32. Rows are dealt out to threads in parts of the channels; what
// all channels add to (the gradients of B and C) has one copy per part.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

// What all rows share.
struct Shape {
    int64_t length, states, tile;
    bool has_softplus;

    int64_t borders() const { return (length - 1) / tile * states; }  // floats kept of a row
};

// The matrices of a row, and its own parameters. B and C: (L, N).
struct Matrices {
    const float *A, *B, *C;
    float skip;
};

// Where the gradients of a row go; those of B and C are added to.
struct RowGradients {
    float *A, *D, *bias, *B, *C;
};

// The tokens of a channel as they lie in memory: u, delta -> y.
struct Sequence {
    const float *u, *delta, *grad_y;
    float bias;
    float *y, *grad_u, *grad_delta;

    const float* inputs(int64_t first, int64_t, float*) const { return u + first; }

    const float* wanted(int64_t first, int64_t, float*) const { return grad_y + first; }

    void raw_steps(int64_t first, int64_t count, float* raw) const {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) raw[t] = delta[first + t] + bias;
    }

    void put(int64_t first, int64_t count, const float* tile) {
        std::copy(tile, tile + count, y + first);
    }

    void put_gradients(int64_t first, int64_t count, const float* for_u, const float* for_raw) {
        std::copy(for_u, for_u + count, grad_u + first);
        std::copy(for_raw, for_raw + count, grad_delta + first);
    }
};

// A channel of a map in one direction: step l reads and adds to pixel order[l]; its step sizes are
// weight · low + bias, with low (R, L).
struct Path {
    const float *x, *grad_y;
    const int64_t* order;
    const float *low, *weight;
    int64_t rank, length;
    float bias;
    float *y, *grad_x, *grad_low, *grad_weight;

    const float* inputs(int64_t first, int64_t count, float* buffer) const {
        for (int64_t t = 0; t < count; ++t) buffer[t] = x[order[first + t]];
        return buffer;
    }

    const float* wanted(int64_t first, int64_t count, float* buffer) const {
        for (int64_t t = 0; t < count; ++t) buffer[t] = grad_y[order[first + t]];
        return buffer;
    }

    void raw_steps(int64_t first, int64_t count, float* raw) const {
        std::fill(raw, raw + count, bias);
        for (int64_t r = 0; r < rank; ++r) {
            const float* row = low + r * length + first;
            const float w = weight[r];
#pragma omp simd
            for (int64_t t = 0; t < count; ++t) raw[t] += w * row[t];
        }
    }

    void put(int64_t first, int64_t count, const float* tile) {
        for (int64_t t = 0; t < count; ++t) y[order[first + t]] += tile[t];
    }

    void put_gradients(int64_t first, int64_t count, const float* for_u, const float* for_raw) {
        for (int64_t t = 0; t < count; ++t) grad_x[order[first + t]] += for_u[t];
        for (int64_t r = 0; r < rank; ++r) {
            const float* row = low + r * length + first;
            float* for_row = grad_low + r * length + first;
            const float w = weight[r];
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < count; ++t) {
                for_row[t] += for_raw[t] * w;
                sum += for_raw[t] * row[t];
            }
            grad_weight[r] += sum;
        }
    }
};

void step_sizes(bool has_softplus, int64_t count, const float* raw, float* dt) {
    if (has_softplus) {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) dt[t] = softplus(raw[t]);
    } else {
        std::copy(raw, raw + count, dt);
    }
}

// States of a tile, and their decays, from the state h that enters; h becomes the one that leaves.
template <int FIXED>
void run_tile(int64_t states, int64_t count, const float* A, const float* B, const float* u,
              const float* dt, float* decay, float* state, float* h) {
    const int64_t N = FIXED ? FIXED : states;
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

int64_t forward_scratch(const Shape& s) { return s.tile * (4 + 2 * s.states) + s.states; }

template <int FIXED, typename Tokens>
void forward_row(const Shape& s, Tokens tokens, const Matrices& m, float* borders, float* scratch) {
    const int64_t N = FIXED ? FIXED : s.states;
    float* raw = scratch;
    float* dt = raw + s.tile;
    float* buffer = dt + s.tile;
    float* out = buffer + s.tile;
    float* decay = out + s.tile;
    float* state = decay + s.tile * N;
    float* h = state + s.tile * N;
    std::fill(h, h + N, 0.0f);
    for (int64_t first = 0; first < s.length; first += s.tile) {
        const int64_t count = std::min(s.tile, s.length - first);
        if (first > 0) borders = std::copy(h, h + N, borders);
        const float* u = tokens.inputs(first, count, buffer);
        const float* C = m.C + first * N;
        tokens.raw_steps(first, count, raw);
        step_sizes(s.has_softplus, count, raw, dt);
        run_tile<FIXED>(N, count, m.A, m.B + first * N, u, dt, decay, state, h);
        const float skip = m.skip;
#pragma omp simd
        for (int64_t t = 0; t < count; ++t)
            out[t] = dot<FIXED>(C + t * N, state + t * N, N) + skip * u[t];
        tokens.put(first, count, out);
    }
}

int64_t backward_scratch(const Shape& s) { return s.tile * (6 + 3 * s.states) + 2 * s.states; }

template <int FIXED, typename Tokens>
void backward_row(const Shape& s, Tokens tokens, const Matrices& m, const float* borders,
                  const RowGradients& to, float* scratch) {
    const int64_t N = FIXED ? FIXED : s.states;
    float* raw = scratch;
    float* dt = raw + s.tile;
    float* buffer = dt + s.tile;
    float* wanted = buffer + s.tile;
    float* for_input = wanted + s.tile;
    float* for_dt = for_input + s.tile;
    float* decay = for_dt + s.tile;
    float* state = decay + s.tile * N;
    float* grad = state + s.tile * N;
    float* h = grad + s.tile * N;
    float* late = h + N;  // what later tokens want of the last state of the tile
    float sum_D = 0.0f, sum_bias = 0.0f;
    std::fill(late, late + N, 0.0f);
    for (int64_t tile = (s.length - 1) / s.tile; tile >= 0; --tile) {
        const int64_t first = tile * s.tile, count = std::min(s.tile, s.length - first);
        const auto enter = [&] {
            if (tile > 0)
                std::copy(borders + (tile - 1) * N, borders + tile * N, h);
            else
                std::fill(h, h + N, 0.0f);
        };
        const float* u = tokens.inputs(first, count, buffer);
        const float* dy = tokens.wanted(first, count, wanted);
        const float* B = m.B + first * N;
        const float* C = m.C + first * N;
        const float* A = m.A;
        float* for_B = to.B + first * N;
        float* for_C = to.C + first * N;
        tokens.raw_steps(first, count, raw);
        step_sizes(s.has_softplus, count, raw, dt);
        enter();
        run_tile<FIXED>(N, count, A, B, u, dt, decay, state, h);

        const float* after = late;
        for (int64_t t = count - 1; t >= 0; --t) {
            for (int64_t n = 0; n < N; ++n)
                grad[t * N + n] = multiply_add(dy[t], C[t * N + n], after[n]);
            for (int64_t n = 0; n < N; ++n) h[n] = decay[t * N + n] * grad[t * N + n];
            after = h;
        }
        std::copy(h, h + N, late);

        enter();
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
            to.A[0] += sum_A;
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
                    to.A[n] += exponent * step;
                }
                for_input[t] = sum_input;
                for_dt[t] = sum_dt;
                before = state + t * N;
            }
        }

        const bool has_softplus = s.has_softplus;
        const float skip = m.skip;
#pragma omp simd reduction(+ : sum_D, sum_bias)
        for (int64_t t = 0; t < count; ++t) {
            const float slope = has_softplus ? sigmoid(raw[t]) : 1.0f;
            const float g = (for_dt[t] + for_input[t] * u[t]) * slope;
            for_input[t] = for_input[t] * dt[t] + skip * dy[t];
            for_dt[t] = g;
            sum_D += dy[t] * u[t];
            sum_bias += g;
        }
        tokens.put_gradients(first, count, for_input, for_dt);
    }
    *to.D += sum_D;
    *to.bias += sum_bias;
}

// ---- sequences: selective_scan ----

struct Scan {
    Shape shape;
    int64_t batch, channels, groups, parts;
    int threads;
    const float *u, *delta, *A, *B, *C, *D, *bias;  // D and bias may be null; B, C (batch, K, L, N)
};

// Calls run(image, group, channel, part, scratch) for all rows; those of a part one after the other.
template <typename Run>
void for_all_rows(const Scan& p, int64_t scratch_size, Run run) {
    const int64_t size = p.channels / p.groups;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t task = 0; task < p.batch * p.groups * p.parts; ++task) {
        std::vector<float> scratch(scratch_size);
        const int64_t part = task % p.parts, group = task / p.parts % p.groups;
        const int64_t image = task / (p.parts * p.groups);
        const int64_t begin = part * size / p.parts, end = (part + 1) * size / p.parts;
        for (int64_t channel = group * size + begin; channel < group * size + end; ++channel)
            run(image, group, channel, part, scratch.data());
    }
}

Sequence sequence_of(const Scan& p, int64_t row, int64_t channel) {
    const int64_t at = row * p.shape.length;
    return {p.u + at, p.delta + at, nullptr, p.bias ? p.bias[channel] : 0.0f,
            nullptr,  nullptr,      nullptr};
}

Matrices matrices_of(const Scan& p, int64_t image, int64_t group, int64_t channel) {
    const int64_t at = (image * p.groups + group) * p.shape.length * p.shape.states;
    return {p.A + channel * p.shape.states, p.B + at, p.C + at, p.D ? p.D[channel] : 0.0f};
}

struct ScanForward {
    const Scan& p;
    float *y, *borders;

    template <int FIXED>
    void run() const {
        for_all_rows(p, forward_scratch(p.shape), [&](int64_t image, int64_t group,
                                                      int64_t channel, int64_t, float* scratch) {
            const int64_t row = image * p.channels + channel;
            Sequence tokens = sequence_of(p, row, channel);
            tokens.y = y + row * p.shape.length;
            forward_row<FIXED>(p.shape, tokens, matrices_of(p, image, group, channel),
                               borders + row * p.shape.borders(), scratch);
        });
    }
};

struct ScanBackward {
    const Scan& p;
    const float *grad_y, *borders;
    float *u, *delta, *A, *D, *bias, *B, *C;  // all but the first two are added to

    template <int FIXED>
    void run() const {
        for_all_rows(p, backward_scratch(p.shape), [&](int64_t image, int64_t group,
                                                       int64_t channel, int64_t part,
                                                       float* scratch) {
            const int64_t row = image * p.channels + channel, at = row * p.shape.length;
            const int64_t matrix = ((part * p.batch + image) * p.groups + group) *
                                   p.shape.length * p.shape.states;
            Sequence tokens = sequence_of(p, row, channel);
            tokens.grad_y = grad_y + at;
            tokens.grad_u = u + at;
            tokens.grad_delta = delta + at;
            backward_row<FIXED>(p.shape, tokens, matrices_of(p, image, group, channel),
                                borders + row * p.shape.borders(),
                                {A + row * p.shape.states, D + row, bias + row, B + matrix,
                                 C + matrix},
                                scratch);
        });
    }
};

// ---- maps: ss2d_scan ----

constexpr int64_t DIRECTIONS = 4;

struct Map {
    Shape shape;  // its length is the number of pixels
    int64_t batch, channels, rank, parts;
    int threads;
    const float* x;          // (batch, D, L)
    const float* projected;  // (batch, L, 4, R + 2N): dt_low, B and C of every pixel
    const float* weight;     // (4, D, R)
    const float *bias, *A, *D;
    const int64_t* order;  // (4, L): the pixel of each step

    int64_t width() const { return rank + 2 * shape.states; }
};

// dt_low (R, L), B and C (L, N) of one image and direction in the order of its steps.
struct Steps {
    std::vector<float> low, B, C;

    explicit Steps(const Map& p)
        : low(p.shape.length * p.rank), B(p.shape.length * p.shape.states), C(B.size()) {}
};

// Offset of step l's pixel in an array like `projected`.
int64_t pixel_at(const Map& p, int64_t image, int64_t direction, int64_t l) {
    const int64_t pixel = p.order[direction * p.shape.length + l];
    return ((image * p.shape.length + pixel) * DIRECTIONS + direction) * p.width();
}

void gather(const Map& p, int64_t image, int64_t direction, Steps& steps) {
    const int64_t R = p.rank, N = p.shape.states;
    for (int64_t l = 0; l < p.shape.length; ++l) {
        const float* from = p.projected + pixel_at(p, image, direction, l);
        for (int64_t r = 0; r < R; ++r) steps.low[r * p.shape.length + l] = from[r];
        std::copy(from + R, from + R + N, steps.B.data() + l * N);
        std::copy(from + R + N, from + R + 2 * N, steps.C.data() + l * N);
    }
}

void scatter(const Map& p, int64_t image, int64_t direction, const Steps& steps, float* projected) {
    const int64_t R = p.rank, N = p.shape.states;
    for (int64_t l = 0; l < p.shape.length; ++l) {
        float* to = projected + pixel_at(p, image, direction, l);
        for (int64_t r = 0; r < R; ++r) to[r] = steps.low[r * p.shape.length + l];
        std::copy_n(steps.B.data() + l * N, N, to + R);
        std::copy_n(steps.C.data() + l * N, N, to + R + N);
    }
}

// For every direction of every part of an image: begin(gradients), then row(steps, gradients, image,
// direction, channel, scratch) for the part's channels, then end(gradients, image, direction, part).
template <typename Begin, typename Row, typename End>
void for_all_paths(const Map& p, int64_t scratch_size, Begin begin, Row row, End end) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t task = 0; task < p.batch * p.parts; ++task) {
        const int64_t image = task / p.parts, part = task % p.parts;
        const int64_t first = part * p.channels / p.parts;
        const int64_t last = (part + 1) * p.channels / p.parts;
        Steps steps(p), gradients(p);
        std::vector<float> scratch(scratch_size);
        for (int64_t direction = 0; direction < DIRECTIONS; ++direction) {
            gather(p, image, direction, steps);
            begin(gradients);
            for (int64_t channel = first; channel < last; ++channel)
                row(steps, gradients, image, direction, channel, scratch.data());
            end(gradients, image, direction, part);
        }
    }
}

Path path_of(const Map& p, const Steps& steps, int64_t image, int64_t direction, int64_t channel) {
    const int64_t parameter = direction * p.channels + channel;
    Path path{};
    path.x = p.x + (image * p.channels + channel) * p.shape.length;
    path.order = p.order + direction * p.shape.length;
    path.low = steps.low.data();
    path.weight = p.weight + parameter * p.rank;
    path.rank = p.rank;
    path.length = p.shape.length;
    path.bias = p.bias[parameter];
    return path;
}

Matrices matrices_of(const Map& p, const Steps& steps, int64_t direction, int64_t channel) {
    const int64_t parameter = direction * p.channels + channel;
    return {p.A + parameter * p.shape.states, steps.B.data(), steps.C.data(), p.D[parameter]};
}

struct MapForward {
    const Map& p;
    float *y, *borders;  // y is added to

    template <int FIXED>
    void run() const {
        for_all_paths(
            p, forward_scratch(p.shape), [](Steps&) {},
            [&](const Steps& steps, Steps&, int64_t image, int64_t direction, int64_t channel,
                float* scratch) {
                Path path = path_of(p, steps, image, direction, channel);
                path.y = y + (image * p.channels + channel) * p.shape.length;
                const int64_t row = (image * DIRECTIONS + direction) * p.channels + channel;
                forward_row<FIXED>(p.shape, path, matrices_of(p, steps, direction, channel),
                                   borders + row * p.shape.borders(), scratch);
            },
            [](const Steps&, int64_t, int64_t, int64_t) {});
    }
};

struct MapBackward {
    const Map& p;
    const float *grad_y, *borders;
    float* x;          // (batch, D, L), added to
    float* projected;  // (parts, batch, L, 4, R + 2N)
    float *weight, *bias, *A, *D;  // (batch, 4, D, ...), added to

    template <int FIXED>
    void run() const {
        for_all_paths(
            p, backward_scratch(p.shape),
            [](Steps& gradients) {
                for (auto* values : {&gradients.low, &gradients.B, &gradients.C})
                    std::fill(values->begin(), values->end(), 0.0f);
            },
            [&](const Steps& steps, Steps& gradients, int64_t image, int64_t direction,
                int64_t channel, float* scratch) {
                const int64_t at = (image * p.channels + channel) * p.shape.length;
                const int64_t row = (image * DIRECTIONS + direction) * p.channels + channel;
                Path path = path_of(p, steps, image, direction, channel);
                path.grad_y = grad_y + at;
                path.grad_x = x + at;
                path.grad_low = gradients.low.data();
                path.grad_weight = weight + row * p.rank;
                backward_row<FIXED>(p.shape, path, matrices_of(p, steps, direction, channel),
                                    borders + row * p.shape.borders(),
                                    {A + row * p.shape.states, D + row, bias + row,
                                     gradients.B.data(), gradients.C.data()},
                                    scratch);
            },
            [&](const Steps& gradients, int64_t image, int64_t direction, int64_t part) {
                const int64_t size = p.batch * p.shape.length * DIRECTIONS * p.width();
                scatter(p, image, direction, gradients, projected + part * size);
            });
    }
};

// The states that networks use have loops of a length that the compiler knows.
template <typename Job>
void run_for_states(int64_t states, const Job& job) {
    switch (states) {
        case 1: return job.template run<1>();
        case 8: return job.template run<8>();
        case 16: return job.template run<16>();
        case 64: return job.template run<64>();
        default: return job.template run<0>();
    }
}

// sizes: length, states, tile, has_softplus, batch, channels, groups or rank, parts, threads.
// No scratch for tokens that a short row has not.
Shape shape_of(const int64_t* sizes) {
    return {sizes[0], sizes[1], std::min(sizes[2], sizes[0]), sizes[3] != 0};
}

Scan scan_of(const int64_t* sizes, const float* const* in) {
    return {shape_of(sizes), sizes[4], sizes[5], sizes[6], sizes[7], static_cast<int>(sizes[8]),
            in[0], in[1], in[2], in[3], in[4], in[5], in[6]};
}

Map map_of(const int64_t* sizes, const float* const* in, const int64_t* order) {
    return {shape_of(sizes), sizes[4], sizes[5], sizes[6], sizes[7], static_cast<int>(sizes[8]),
            in[0], in[1], in[2], in[3], in[4], in[5], order};
}

}  // namespace

extern "C" {

// inputs: u, delta, A, B, C, D, bias.
void cmfs_scan_forward(const int64_t* sizes, const float* const* inputs, float* y, float* borders) {
    const Scan scan = scan_of(sizes, inputs);
    run_for_states(scan.shape.states, ScanForward{scan, y, borders});
}

// to: gradients of u, delta, A, D, bias, B, C.
void cmfs_scan_backward(const int64_t* sizes, const float* const* inputs, const float* grad_y,
                        const float* borders, float* const* to) {
    const Scan scan = scan_of(sizes, inputs);
    run_for_states(scan.shape.states, ScanBackward{scan, grad_y, borders, to[0], to[1], to[2],
                                                   to[3], to[4], to[5], to[6]});
}

// inputs: x, projected, weight, bias, A, D.
void cmfs_map_forward(const int64_t* sizes, const float* const* inputs, const int64_t* order,
                      float* y, float* borders) {
    const Map map = map_of(sizes, inputs, order);
    run_for_states(map.shape.states, MapForward{map, y, borders});
}

// to: gradients of x, projected, weight, bias, A, D.
void cmfs_map_backward(const int64_t* sizes, const float* const* inputs, const int64_t* order,
                       const float* grad_y, const float* borders, float* const* to) {
    const Map map = map_of(sizes, inputs, order);
    run_for_states(map.shape.states, MapBackward{map, grad_y, borders, to[0], to[1], to[2], to[3],
                                                 to[4], to[5]});
}
}
