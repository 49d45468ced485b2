// All passes of a pre-norm transformer layer but its matrix products, which are torch's; see cpu.py for the data flow.
//
// Rows are tokens, of `b` samples in one memory. T is what products are of, float or bf16; the residual stream is float.
// Sums over rows are of PART rows at a time and then of those, so that they don't depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

constexpr int64_t PART = 64, LANES = 16;

struct bf16 { uint16_t bits; };

inline float get(float v) { return v; }
inline float get(bf16 v) {
    const uint32_t wide = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

inline void put(float &to, float v) { to = v; }
inline void put(bf16 &to, float v) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits += 0x7fff + ((bits >> 16) & 1);
    to.bits = v == v ? uint16_t(bits >> 16) : uint16_t(0x7fc0);
}

inline float exponential(float x) {  // of x <= 0; relative error 2e-7
    x = x < -87.0f ? -87.0f : x;
    const float magic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to a whole number
    const float n = (x * 1.44269504f + magic) - magic;
    const float r = x - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
    float p = 1.0f + r * (1.0f / 7);
    p = 1.0f + r * p * (1.0f / 6);
    p = 1.0f + r * p * (1.0f / 5);
    p = 1.0f + r * p * (1.0f / 4);
    p = 1.0f + r * p * (1.0f / 3);
    p = 1.0f + r * p * 0.5f;
    p = 1.0f + r * p;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// P(N < x) and, times x, the density of a standard normal N: Abramowitz & Stegun 1964, 7.1.26, |error| <= 0.8e-7.
inline void normal(float x, float &below, float &x_density) {
    const float away = std::fabs(x) * 0.70710678f, bell = exponential(-away * away);
    const float t = 1.0f / (1.0f + 0.3275911f * away);
    const float tail =
        0.5f * bell * t *
        (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    below = x < 0 ? tail : 1.0f - tail;
    x_density = x * bell * 0.39894228f;
}

// Sums over rows, of `sums` rows of d numbers each: `each(row, where)` adds one row's. `out` has one set, or a set for
// each sample. `partial`: [samples, parts of a sample, sums, d].
template <class F>
void sum_rows(int64_t b, int64_t tokens, int64_t sums, int64_t d, float *partial, float *out, bool per_sample,
              int threads, F each) {
    const int64_t parts = (tokens + PART - 1) / PART, width = sums * d;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (int64_t part = 0; part < b * parts; ++part) {
            float *here = partial + part * width;
            std::fill(here, here + width, 0.0f);
            const int64_t sample = part / parts, first = part % parts * PART;
            for (int64_t t = first; t < std::min(first + PART, tokens); ++t) each(sample * tokens + t, sample, here);
        }
        const int64_t groups = per_sample ? b : 1, members = per_sample ? parts : b * parts, block = 64;
        const int64_t blocks = (width + block - 1) / block;
        #pragma omp for schedule(static)
        for (int64_t at = 0; at < groups * blocks; ++at) {
            const int64_t group = at / blocks, from = at % blocks * block, to = std::min(from + block, width);
            float *total = out + group * width;
            std::fill(total + from, total + to, 0.0f);
            for (int64_t m = 0; m < members; ++m) {
                const float *one = partial + (group * members + m) * width;
                #pragma omp simd
                for (int64_t i = from; i < to; ++i) total[i] += one[i];
            }
        }
    }
}

template <class T>
void norm(const float *x, const float *weight, const float *bias, float eps, T *out, float *mean, float *rstd,
          int64_t rows, int64_t d, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float *in = x + row * d;
        T *to = out + row * d;
        float sum = 0, squares = 0;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; ++i) sum += in[i];
        const float middle = sum / float(d);
        #pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < d; ++i) squares += (in[i] - middle) * (in[i] - middle);
        const float scale = 1.0f / std::sqrt(squares / float(d) + eps);
        #pragma omp simd
        for (int64_t i = 0; i < d; ++i) put(to[i], (in[i] - middle) * scale * weight[i] + bias[i]);
        mean[row] = middle, rstd[row] = scale;
    }
}

// grad_x = grad_out + the gradient through the norm; sums: weight, bias.
template <class T>
void norm_backward(const T *grad, const float *x, const float *mean, const float *rstd, const float *weight,
                   const float *grad_out, float *grad_x, float *partial, float *sums, int64_t b, int64_t tokens,
                   int64_t d, int threads) {
    sum_rows(b, tokens, 2, d, partial, sums, false, threads, [=](int64_t row, int64_t, float *here) {
        const T *g = grad + row * d;
        const float *in = x + row * d, *residual = grad_out + row * d, middle = mean[row], scale = rstd[row];
        float *to = grad_x + row * d, *to_weight = here, *to_bias = here + d;
        float along = 0, level = 0;
        #pragma omp simd reduction(+ : along, level)
        for (int64_t i = 0; i < d; ++i) {
            const float unit = (in[i] - middle) * scale, one = get(g[i]), weighted = one * weight[i];
            level += weighted, along += weighted * unit;
            to_weight[i] += one * unit, to_bias[i] += one;
        }
        level /= float(d), along /= float(d);
        #pragma omp simd
        for (int64_t i = 0; i < d; ++i) {
            const float unit = (in[i] - middle) * scale;
            to[i] = residual[i] + scale * (get(g[i]) * weight[i] - level - unit * along);
        }
    });
}

// out = x + scale * branch; a scale for each sample (stride d) or one for all (0); none: 1.
template <class T>
void add(const float *x, const T *branch, const float *scale, int64_t stride, float *out, int64_t b, int64_t tokens,
         int64_t d, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < b * tokens; ++row) {
        const float *in = x + row * d, *by = scale ? scale + row / tokens * stride : nullptr;
        const T *more = branch + row * d;
        float *to = out + row * d;
        if (by) {
            #pragma omp simd
            for (int64_t i = 0; i < d; ++i) to[i] = in[i] + by[i] * get(more[i]);
        } else {
            #pragma omp simd
            for (int64_t i = 0; i < d; ++i) to[i] = in[i] + get(more[i]);
        }
    }
}

// grad = scale * grad_out; sums: the branch's own bias and the scale, for each sample where scales are.
template <class T>
void add_backward(const float *grad_out, const T *branch, const float *scale, int64_t stride, T *grad, float *partial,
                  float *sums, int64_t b, int64_t tokens, int64_t d, int threads) {
    const bool per_sample = stride > 0;
    sum_rows(b, tokens, 2, d, partial, sums, per_sample, threads, [=](int64_t row, int64_t sample, float *here) {
        const float *g = grad_out + row * d, *by = scale ? scale + sample * stride : nullptr;
        const T *was = branch + row * d;
        T *to = grad + row * d;
        float *to_bias = here, *to_scale = here + d;
        if (by) {
            #pragma omp simd
            for (int64_t i = 0; i < d; ++i) {
                const float one = g[i] * by[i];
                put(to[i], one);
                to_bias[i] += one, to_scale[i] += g[i] * get(was[i]);
            }
        } else {
            #pragma omp simd
            for (int64_t i = 0; i < d; ++i) put(to[i], g[i]), to_bias[i] += g[i];
        }
    });
}

// grad *= the derivative at x; sums: the bias in x.
template <class T>
void gelu_backward(const T *x, T *grad, float *partial, float *sums, int64_t b, int64_t tokens, int64_t d,
                   int threads) {
    sum_rows(b, tokens, 1, d, partial, sums, false, threads, [=](int64_t row, int64_t, float *here) {
        const T *at = x + row * d;
        T *g = grad + row * d;
        #pragma omp simd
        for (int64_t i = 0; i < d; ++i) {
            float below, density;
            normal(get(at[i]), below, density);
            const float one = get(g[i]) * (below + density);
            put(g[i], one);
            here[i] += one;
        }
    });
}

// stride: of a sample's rotations, 0 where all share. A token has `turned` of them, more than `pairs` and the last ones
// by 0, so that whole vectors turn.
struct Heads { int64_t b, tokens, heads, width, pairs, turned, stride; };

// Channels i and i + pairs of a head turn by an angle; all are multiplied by `factor`.
template <class T, class U>
inline void turn(const T *from, U *to, const float *cos, const float *sin, float sign, float factor, const Heads &s) {
    #pragma omp simd
    for (int64_t i = 0; i < s.turned; ++i)
        put(to[i], (get(from[i]) * cos[i] - get(from[i + s.pairs]) * sign * sin[i]) * factor);
    #pragma omp simd
    for (int64_t i = 0; i < s.turned; ++i)  // over what the first loop wrote beyond its pairs
        put(to[i + s.pairs], (get(from[i + s.pairs]) * cos[i] + get(from[i]) * sign * sin[i]) * factor);
    for (int64_t i = s.pairs + s.turned; i < s.width; ++i) put(to[i], get(from[i]) * factor);
}

// joint [b, tokens, 3, heads, width] to q, k, v [b, heads, tokens, width]; q and k are turned, q times `factor`.
template <class T>
void split(const T *joint, const float *cos, const float *sin, float factor, T *q, T *k, T *v, Heads s, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < s.b * s.tokens; ++row) {
        const int64_t sample = row / s.tokens, t = row % s.tokens, d = s.heads * s.width;
        const float *c = cos + sample * s.stride + t * s.turned, *sn = sin + sample * s.stride + t * s.turned;
        for (int64_t h = 0; h < s.heads; ++h) {
            const T *from = joint + row * 3 * d + h * s.width;
            const int64_t to = ((sample * s.heads + h) * s.tokens + t) * s.width;
            turn(from, q + to, c, sn, 1.0f, factor, s);
            turn(from + d, k + to, c, sn, 1.0f, 1.0f, s);
            std::copy(from + 2 * d, from + 2 * d + s.width, v + to);
        }
    }
}

// The way back; sums: the joint product's bias, 3 x d.
template <class T>
void split_backward(const T *q, const T *k, const T *v, const float *cos, const float *sin, float factor, T *joint,
                    float *partial, float *sums, Heads s, int threads) {
    const int64_t d = s.heads * s.width;
    sum_rows(s.b, s.tokens, 3, d, partial, sums, false, threads, [=](int64_t row, int64_t sample, float *here) {
        const int64_t t = row % s.tokens;
        const float *c = cos + sample * s.stride + t * s.turned, *sn = sin + sample * s.stride + t * s.turned;
        T *to = joint + row * 3 * d;
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t from = ((sample * s.heads + h) * s.tokens + t) * s.width;
            turn(q + from, to + h * s.width, c, sn, -1.0f, factor, s);
            turn(k + from, to + d + h * s.width, c, sn, -1.0f, 1.0f, s);
            std::copy(v + from, v + from + s.width, to + 2 * d + h * s.width);
        }
        #pragma omp simd
        for (int64_t i = 0; i < 3 * d; ++i) here[i] += get(to[i]);
    });
}

// [b, heads, tokens, width] to [b, tokens, heads, width], or back.
template <class T> void join(const T *from, T *to, Heads s, bool back, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < s.b * s.tokens; ++row) {
        const int64_t sample = row / s.tokens, t = row % s.tokens;
        for (int64_t h = 0; h < s.heads; ++h) {
            const int64_t apart = ((sample * s.heads + h) * s.tokens + t) * s.width, joined = (row * s.heads + h) * s.width;
            if (back) std::copy(from + joined, from + joined + s.width, to + apart);
            else std::copy(from + apart, from + apart + s.width, to + joined);
        }
    }
}

// Rows of odd lengths, LANES at a time: a tail one by one would take as long as the rest.
template <class T> inline void load(const T *from, int64_t count, float fill, float *to) {
    if (count >= LANES) {
        #pragma omp simd
        for (int64_t i = 0; i < LANES; ++i) to[i] = get(from[i]);
    } else {
        for (int64_t i = 0; i < LANES; ++i) to[i] = i < count ? get(from[i]) : fill;
    }
}

template <class T> inline void store(T *to, int64_t count, const float *from) {
    if (count >= LANES) {
        #pragma omp simd
        for (int64_t i = 0; i < LANES; ++i) put(to[i], from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) put(to[i], from[i]);
    }
}

// In place, along rows of n; scratch: n numbers, up to a multiple of LANES, for each thread.
template <class T> void softmax(T *x, int64_t rows, int64_t n, float *scratch, int threads) {
    const int64_t padded = (n + LANES - 1) / LANES * LANES;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        T *at = x + row * n;
        float *here = scratch + omp_get_thread_num() * padded, largest = -INFINITY, sum = 0;
        for (int64_t i = 0; i < n; i += LANES) load(at + i, n - i, -INFINITY, here + i);
        #pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < padded; ++i) largest = here[i] > largest ? here[i] : largest;
        #pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < padded; ++i) {
            here[i] = exponential(here[i] - largest), sum += here[i];  // NaN stays NaN; the tail has e^-87
        }
        const float factor = 1.0f / sum;
        #pragma omp simd
        for (int64_t i = 0; i < padded; ++i) here[i] *= factor;
        for (int64_t i = 0; i < n; i += LANES) store(at + i, n - i, here + i);
    }
}

}  // namespace

#define HEADS int64_t b, int64_t tokens, int64_t heads, int64_t width, int64_t pairs, int64_t turned, int64_t stride
#define EXPORT(T, NAME)                                                                                                \
    void norm_##NAME(const float *x, const float *weight, const float *bias, float eps, T *out, float *mean,           \
                     float *rstd, int64_t rows, int64_t d, int threads) {                                              \
        norm(x, weight, bias, eps, out, mean, rstd, rows, d, threads);                                                 \
    }                                                                                                                  \
    void norm_backward_##NAME(const T *grad, const float *x, const float *mean, const float *rstd,                     \
                              const float *weight, const float *grad_out, float *grad_x, float *partial, float *sums,  \
                              int64_t b, int64_t tokens, int64_t d, int threads) {                                     \
        norm_backward(grad, x, mean, rstd, weight, grad_out, grad_x, partial, sums, b, tokens, d, threads);            \
    }                                                                                                                  \
    void add_##NAME(const float *x, const T *branch, const float *scale, int64_t stride, float *out, int64_t b,        \
                    int64_t tokens, int64_t d, int threads) {                                                          \
        add(x, branch, scale, stride, out, b, tokens, d, threads);                                                     \
    }                                                                                                                  \
    void add_backward_##NAME(const float *grad_out, const T *branch, const float *scale, int64_t stride, T *grad,      \
                             float *partial, float *sums, int64_t b, int64_t tokens, int64_t d, int threads) {         \
        add_backward(grad_out, branch, scale, stride, grad, partial, sums, b, tokens, d, threads);                     \
    }                                                                                                                  \
    void gelu_backward_##NAME(const T *x, T *grad, float *partial, float *sums, int64_t b, int64_t tokens, int64_t d,  \
                              int threads) {                                                                           \
        gelu_backward(x, grad, partial, sums, b, tokens, d, threads);                                                  \
    }                                                                                                                  \
    void split_##NAME(const T *joint, const float *cos, const float *sin, float factor, T *q, T *k, T *v, HEADS,       \
                      int threads) {                                                                                   \
        split(joint, cos, sin, factor, q, k, v, {b, tokens, heads, width, pairs, turned, stride}, threads);                    \
    }                                                                                                                  \
    void split_backward_##NAME(const T *q, const T *k, const T *v, const float *cos, const float *sin, float factor,   \
                               T *joint, float *partial, float *sums, HEADS, int threads) {                            \
        split_backward(q, k, v, cos, sin, factor, joint, partial, sums, {b, tokens, heads, width, pairs, turned, stride},      \
                       threads);                                                                                       \
    }                                                                                                                  \
    void join_##NAME(const T *from, T *to, HEADS, int back, int threads) {                                             \
        join(from, to, {b, tokens, heads, width, pairs, turned, stride}, back != 0, threads);                                  \
    }                                                                                                                  \
    void softmax_##NAME(T *x, int64_t rows, int64_t n, float *scratch, int threads) {                                  \
        softmax(x, rows, n, scratch, threads);                                                                         \
    }

extern "C" {
EXPORT(float, f32)
EXPORT(bf16, bf16)
}
