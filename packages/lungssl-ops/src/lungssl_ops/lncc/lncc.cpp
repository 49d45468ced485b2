// LNCC and its gradients in one sweep along z; see cpu.py for the data flow. All sums in double.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <omp.h>

namespace {

enum Mode { COUNT, MASKED, ZEROS };
enum Field { F, M, FF, MM, FM, N, FIELDS };          // sums over the window
enum Adjoint { C, A_MOVING, B_MOVING, A_FIXED, B_FIXED };  // what the gradients sum over the window

int64_t neighbours(int64_t at, int64_t length, int64_t half) {
    return std::min(at + half, length - 1) - std::max<int64_t>(at - half, 0) + 1;
}

struct Shape {
    int64_t depth, height, width, window;
    int64_t half() const { return window / 2; }
    int64_t plane() const { return height * width; }
    int64_t volume() const { return depth * height * width; }
    // Sums along z start afresh at these planes, whichever thread comes there: results don't depend on the threads.
    int64_t chunk() const { return std::max<int64_t>(16, 2 * window); }
    int64_t chunks() const { return (depth + chunk() - 1) / chunk(); }
    int64_t padded() const { return width + window - 1; }
};

template <class T> struct Images {
    const T *fixed, *moving, *mask, *upstream;
    T *map, *grad_fixed, *grad_moving;
    double shift_fixed, shift_moving, total, eps;
};

// Per thread: z sums of products; z sums of adjoints and a ring of `window` planes of them; rows.
struct Scratch {
    double *sums, *adjoint_sums, *ring, *padded, *boxed, *spare, *counts, *weight, *upstream, *found, *fields;
    Scratch(double *at, const Shape &s, int sides) {
        const int adjoints = sides ? 1 + 2 * sides : 0;
        auto take = [&at](int64_t count) { double *here = at; at += count; return here; };
        sums = take(FIELDS * s.plane());
        adjoint_sums = take(adjoints * s.plane());
        ring = take(adjoints * s.window * s.plane());
        padded = take(FIELDS * s.padded());
        boxed = take(FIELDS * s.width);
        spare = take(2 * s.padded());
        weight = take(s.width), upstream = take(s.width), found = take(s.width), fields = take(FIELDS * s.width);
        counts = take(s.width);  // voxels of a window along x
        for (int64_t x = 0; x < s.width; x++) counts[x] = double(neighbours(x, s.width, s.half()));
    }
    static int64_t size(const Shape &s, int sides) {
        const int adjoints = sides ? 1 + 2 * sides : 0;
        return (FIELDS + adjoints * (1 + s.window)) * s.plane() + (FIELDS + 2) * s.padded() +
               (2 * FIELDS + 4) * s.width;
    }
};

// sums += products of plane `in` - products of plane `out`, of those that there are.
template <class T, Mode MODE, bool IN, bool OUT>
void slide(const Images<T> &v, double *__restrict sums, int64_t in, int64_t out, int64_t plane) {
    const T *fixed_in = v.fixed + (IN ? in * plane : 0), *fixed_out = v.fixed + (OUT ? out * plane : 0);
    const T *moving_in = v.moving + (IN ? in * plane : 0), *moving_out = v.moving + (OUT ? out * plane : 0);
    const T *mask_in = MODE == MASKED && IN ? v.mask + in * plane : nullptr;
    const T *mask_out = MODE == MASKED && OUT ? v.mask + out * plane : nullptr;
    double *__restrict f = sums, *__restrict m = sums + plane, *__restrict ff = sums + 2 * plane;
    double *__restrict mm = sums + 3 * plane, *__restrict fm = sums + 4 * plane, *__restrict n = sums + 5 * plane;
    const double shift_fixed = v.shift_fixed, shift_moving = v.shift_moving;
    for (int64_t i = 0; i < plane; i++) {
        double d_f = 0, d_m = 0, d_ff = 0, d_mm = 0, d_fm = 0, d_n = 0;
        if (IN) {
            double a = fixed_in[i] - shift_fixed, b = moving_in[i] - shift_moving, w = 1;
            if (MODE == MASKED) {
                w = mask_in[i];
                a = w > 0 ? a : 0;  // not a product: what lies outside the mask may be NaN
                b = w > 0 ? b : 0;
                d_n = w;
            }
            const double wa = MODE == MASKED ? w * a : a, wb = MODE == MASKED ? w * b : b;
            d_f = wa, d_m = wb, d_ff = wa * a, d_mm = wb * b, d_fm = wa * b;
        }
        if (OUT) {
            double a = fixed_out[i] - shift_fixed, b = moving_out[i] - shift_moving, w = 1;
            if (MODE == MASKED) {
                w = mask_out[i];
                a = w > 0 ? a : 0;
                b = w > 0 ? b : 0;
                d_n -= w;
            }
            const double wa = MODE == MASKED ? w * a : a, wb = MODE == MASKED ? w * b : b;
            d_f -= wa, d_m -= wb, d_ff -= wa * a, d_mm -= wb * b, d_fm -= wa * b;
        }
        f[i] += d_f, m[i] += d_m, ff[i] += d_ff, mm[i] += d_mm, fm[i] += d_fm;
        if (MODE == MASKED) n[i] += d_n;
    }
}

template <class T, Mode MODE>
void slide_to(const Images<T> &v, double *sums, int64_t z, bool restart, const Shape &s) {
    const int64_t in = z + s.half(), out = z - s.half() - 1, plane = s.plane();
    if (restart) {
        std::memset(sums, 0, FIELDS * plane * sizeof(double));
        for (int64_t k = std::max<int64_t>(0, z - s.half()); k <= std::min(in, s.depth - 1); k++)
            slide<T, MODE, true, false>(v, sums, k, -1, plane);
    } else if (in < s.depth && out >= 0) {
        slide<T, MODE, true, true>(v, sums, in, out, plane);
    } else if (in < s.depth) {
        slide<T, MODE, true, false>(v, sums, in, -1, plane);
    } else if (out >= 0) {
        slide<T, MODE, false, true>(v, sums, -1, out, plane);
    }
}

// Moves sums of rows y - half ... y + half of one plane on to the next y, in the middle of a row padded with zeros.
void slide_row(const double *__restrict plane, double *__restrict padded, int64_t y, const Shape &s) {
    double *__restrict row = padded + s.half();
    if (y == 0) {
        std::memset(padded, 0, s.padded() * sizeof(double));
        for (int64_t k = 0; k <= std::min(s.half(), s.height - 1); k++)
            for (int64_t x = 0; x < s.width; x++) row[x] += plane[k * s.width + x];
        return;
    }
    const int64_t in = y + s.half(), out = y - s.half() - 1;
    const double *__restrict added = plane + in * s.width, *__restrict removed = plane + out * s.width;
    if (in < s.height && out >= 0)
        for (int64_t x = 0; x < s.width; x++) row[x] += added[x] - removed[x];
    else if (in < s.height)
        for (int64_t x = 0; x < s.width; x++) row[x] += added[x];
    else if (out >= 0)
        for (int64_t x = 0; x < s.width; x++) row[x] -= removed[x];
}

void add_pairs(const double *__restrict from, double *__restrict to, int64_t span, int64_t length) {
    for (int64_t i = 0; i < length; i++) to[i] = from[i] + from[i + span];
}

// boxed[x] = padded[x] + ... + padded[x + window - 1], by doubling: sums of 1, 2, 4, ... neighbours.
void box_row(const double *__restrict padded, double *__restrict boxed, double *spare, const Shape &s) {
    const double *sums = padded;
    int64_t span = 1, done = 0;
    for (int64_t rest = s.window;; rest >>= 1) {
        if (rest & 1) {
            const double *__restrict from = sums + done;
            if (done == 0)
                for (int64_t x = 0; x < s.width; x++) boxed[x] = from[x];
            else
                for (int64_t x = 0; x < s.width; x++) boxed[x] += from[x];
            done += span;
        }
        if (rest == 1) return;
        double *to = sums == spare ? spare + s.padded() : spare;
        add_pairs(sums, to, span, s.padded() - 2 * span + 1);
        sums = to, span *= 2;
    }
}

// What each voxel of a row weighs in the mean, and its adjoints.
template <class T> void weigh_row(const Images<T> &v, const Scratch &k, int64_t row, const Shape &s) {
    double *__restrict weight = k.weight, *__restrict upstream = k.upstream;
    const double mean = 1 / v.total;
    for (int64_t x = 0; x < s.width; x++) weight[x] = v.mask ? double(v.mask[row + x]) : 1;
    for (int64_t x = 0; x < s.width; x++) upstream[x] = v.upstream ? double(v.upstream[row + x]) : mean * weight[x];
}

// LNCC of one row from the sums in `boxed`, and the adjoint fields for SIDES gradients.
template <class T, Mode MODE, int SIDES>
void compare_row(const Images<T> &v, const Scratch &k, double rows, const Shape &s) {
    const int64_t width = s.width;
    const double cube = double(s.window * s.window * s.window), eps = v.eps, a = v.shift_fixed, b = v.shift_moving;
    const double *__restrict boxed = k.boxed, *__restrict counts = k.counts;
    const double *__restrict weight = k.weight, *__restrict upstream = k.upstream;
    double *__restrict values = k.found, *__restrict fields = k.fields;
    for (int64_t x = 0; x < width; x++) {
        double f = boxed[F * width + x], m = boxed[M * width + x], n = rows * counts[x];
        double ff = boxed[FF * width + x], mm = boxed[MM * width + x], fm = boxed[FM * width + x];
        const double w = MODE == MASKED ? weight[x] : 1;
        if (MODE == MASKED) n = w > 0 ? boxed[N * width + x] : 1;
        if (MODE == ZEROS) {
            const double outside = cube - n;  // where a zero is -shift here
            n = cube;
            f -= outside * a, m -= outside * b;
            ff += outside * a * a, mm += outside * b * b, fm += outside * a * b;
        }
        const double one = 1 / n, cross = fm - f * m * one;
        const double v_f = std::max(ff - f * f * one, 0.), v_m = std::max(mm - m * m * one, 0.);
        const double d_f = MODE == ZEROS ? std::max(v_f, eps) : v_f + n * eps;
        const double d_m = MODE == ZEROS ? std::max(v_m, eps) : v_m + n * eps;
        const double product = 1 / (d_f * d_m), found = cross * cross * product;
        values[x] = MODE == MASKED ? (w > 0 ? found : 0) : found;
        if (SIDES) {
            const double g = MODE == MASKED ? (w > 0 ? upstream[x] : 0) : upstream[x];
            const double c = 2 * cross * product * g, factor = -found * product * g;
            double b_f = factor * d_m, b_m = factor * d_f;  // -lncc / d
            if (MODE == ZEROS) b_f = v_f > eps ? b_f : 0, b_m = v_m > eps ? b_m : 0;
            fields[C * width + x] = c;
            fields[A_MOVING * width + x] = -(c * f + 2 * b_m * m) * one;
            fields[B_MOVING * width + x] = b_m;
            if (SIDES == 2) fields[A_FIXED * width + x] = -(c * m + 2 * b_f * f) * one;
            if (SIDES == 2) fields[B_FIXED * width + x] = b_f;
        }
    }
}

// The row's part of the mean; in four parts, which the compiler may not reorder itself.
template <class T> double total_row(const Images<T> &v, const Scratch &k, int64_t row, const Shape &s) {
    if (v.map)
        for (int64_t x = 0; x < s.width; x++) v.map[row + x] = T(k.found[x]);
    double parts[4] = {0, 0, 0, 0};
    int64_t x = 0;
    for (; x + 4 <= s.width; x += 4)
        for (int i = 0; i < 4; i++) parts[i] += k.weight[x + i] * k.found[x + i];
    for (; x < s.width; x++) parts[0] += k.weight[x] * k.found[x];
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// Puts adjoints into the ring, in the place of those `window` planes before, and moves their z sums on.
void keep_row(const Scratch &k, int adjoints, int64_t slot, int64_t y, const Shape &s) {
    for (int i = 0; i < adjoints; i++) {
        const double *__restrict fields = k.fields + i * s.width;
        double *__restrict ring = k.ring + (i * s.window + slot) * s.plane() + y * s.width;
        double *__restrict sums = k.adjoint_sums + i * s.plane() + y * s.width;
        for (int64_t x = 0; x < s.width; x++) {
            sums[x] += fields[x] - ring[x];
            ring[x] = fields[x];
        }
    }
}

// Sums over z of the adjoints for gradient plane z, where compare_row hasn't kept them up.
void slide_adjoints(const Scratch &k, int adjoints, int64_t z, bool restart, const Shape &s) {
    const int64_t plane = s.plane(), first = std::max<int64_t>(0, z - s.half());
    for (int i = 0; i < adjoints; i++) {
        double *__restrict sums = k.adjoint_sums + i * plane;
        const double *ring = k.ring + i * s.window * plane;
        if (restart) {
            std::memset(sums, 0, plane * sizeof(double));
            for (int64_t at = first; at <= std::min(z + s.half(), s.depth - 1); at++) {
                const double *__restrict from = ring + at % s.window * plane;
                for (int64_t j = 0; j < plane; j++) sums[j] += from[j];
            }
        } else if (z + s.half() >= s.depth && z > s.half()) {
            const double *__restrict from = ring + (z - s.half() - 1) % s.window * plane;
            for (int64_t j = 0; j < plane; j++) sums[j] -= from[j];
        }
    }
}

template <class T, Mode MODE>
void gradient_row(const Images<T> &v, const Scratch &k, int64_t row, int side, const Shape &s) {
    const double *__restrict c = k.boxed, *__restrict a = c + (1 + 2 * side) * s.width, *__restrict b = a + s.width;
    const T *__restrict own = (side ? v.fixed : v.moving) + row, *__restrict other = (side ? v.moving : v.fixed) + row;
    const T *__restrict mask = MODE == MASKED ? v.mask + row : nullptr;
    T *__restrict gradient = (side ? v.grad_fixed : v.grad_moving) + row;
    const double own_shift = side ? v.shift_fixed : v.shift_moving, other_shift = side ? v.shift_moving : v.shift_fixed;
    for (int64_t x = 0; x < s.width; x++) {
        double found = a[x] + 2 * (own[x] - own_shift) * b[x] + (other[x] - other_shift) * c[x];
        if (MODE == MASKED) found = mask[x] > 0 ? mask[x] * found : 0;
        gradient[x] = T(found);
    }
}

// Planes first ... last - 1: their part of the loss, and of the gradients.
template <class T, Mode MODE, int SIDES>
void sweep(const Images<T> &v, const Scratch &k, int64_t first, int64_t last, double *losses, const Shape &s) {
    constexpr int adjoints = SIDES ? 1 + 2 * SIDES : 0, fields = MODE == MASKED ? FIELDS : FIELDS - 1;
    const int64_t half = s.half(), chunk = s.chunk();
    if (SIDES) std::memset(k.adjoint_sums, 0, adjoints * (1 + s.window) * s.plane() * sizeof(double));  // and the ring
    const int64_t reach = SIDES ? half : 0, start = std::max<int64_t>(0, first - reach), stop = last + reach;
    for (int64_t z = start; z < stop; z++) {
        const bool counts = z >= first && z < last;
        if (z < s.depth) {
            slide_to<T, MODE>(v, k.sums, z, z == start || (z + half) % chunk == 0, s);
            const int64_t deep = neighbours(z, s.depth, half);
            double total = 0;
            for (int64_t y = 0; y < s.height && (SIDES || counts); y++) {
                for (int i = 0; i < fields; i++) {
                    slide_row(k.sums + i * s.plane(), k.padded + i * s.padded(), y, s);
                    box_row(k.padded + i * s.padded(), k.boxed + i * s.width, k.spare, s);
                }
                const int64_t row = (z * s.height + y) * s.width;
                weigh_row(v, k, row, s);
                compare_row<T, MODE, SIDES>(v, k, double(deep * neighbours(y, s.height, half)), s);
                total += total_row(v, k, row, s);
                keep_row(k, adjoints, z % s.window, y, s);
            }
            if (counts) losses[z] = total;
        }
        const int64_t plane = z - half;
        if (!SIDES || plane < first || plane >= std::min(last, s.depth)) continue;
        slide_adjoints(k, adjoints, plane, plane % chunk == 0, s);
        for (int64_t y = 0; y < s.height; y++) {
            for (int i = 0; i < adjoints; i++) {
                slide_row(k.adjoint_sums + i * s.plane(), k.padded + i * s.padded(), y, s);
                box_row(k.padded + i * s.padded(), k.boxed + i * s.width, k.spare, s);
            }
            for (int side = 0; side < SIDES; side++)
                gradient_row<T, MODE>(v, k, (plane * s.height + y) * s.width, side, s);
        }
    }
}

// Per plane: the sums of the weights, and of both images times the weights.
template <class T> void plane_sums(const T *fixed, const T *moving, const T *mask, int64_t plane, double *found) {
    double w = 0, f = 0, m = 0;
    for (int64_t i = 0; i < plane; i++) {
        const double at = mask ? double(mask[i]) : 1;
        w += at;
        f += at > 0 ? at * fixed[i] : 0;
        m += at > 0 ? at * moving[i] : 0;
    }
    found[0] = w, found[1] = f, found[2] = m;
}

template <class T, Mode MODE>
void sweep_sides(const Images<T> &v, const Scratch &k, int64_t first, int64_t last, double *losses, const Shape &s,
                 int sides) {
    if (sides == 0) sweep<T, MODE, 0>(v, k, first, last, losses, s);
    if (sides == 1) sweep<T, MODE, 1>(v, k, first, last, losses, s);
    if (sides == 2) sweep<T, MODE, 2>(v, k, first, last, losses, s);
}

template <class T>
void lncc(Images<T> all, double *loss, double *partial, double *scratch, int64_t batch, const Shape &s, int zeros,
          int threads) {
    const int sides = all.grad_fixed ? 2 : all.grad_moving ? 1 : 0;
    const int64_t plane = s.plane(), planes = batch * s.depth, volume = s.volume();
    double *losses = partial + 3 * planes;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < planes; i++)
        plane_sums(all.fixed + i * plane, all.moving + i * plane, all.mask ? all.mask + i * plane : nullptr, plane,
                   partial + 3 * i);
    const int64_t slabs = std::min(s.chunks(), std::max<int64_t>(1, (threads + batch - 1) / batch));
    const int64_t size = Scratch::size(s, sides);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t job = 0; job < batch * slabs; job++) {
        const int64_t item = job / slabs, slab = job % slabs, at = item * volume;
        double sum[3] = {0, 0, 0};
        for (int64_t z = 0; z < s.depth; z++)
            for (int i = 0; i < 3; i++) sum[i] += partial[3 * (item * s.depth + z) + i];
        Images<T> v = all;
        v.fixed += at, v.moving += at;
        if (v.mask) v.mask += at;
        if (v.upstream) v.upstream += at;
        if (v.map) v.map += at;
        if (v.grad_fixed) v.grad_fixed += at;
        if (v.grad_moving) v.grad_moving += at;
        v.total = sum[0], v.shift_fixed = sum[1] / sum[0], v.shift_moving = sum[2] / sum[0];
        if (sum[0] == 0) v.shift_fixed = v.shift_moving = 0;  // an empty mask: no voxel is used
        // Slabs of the mean alone end where its z sums start afresh.
        const int64_t early = sides ? 0 : s.half(), chunk = s.chunk();
        const int64_t begin = slab * s.chunks() / slabs, end = (slab + 1) * s.chunks() / slabs;
        const int64_t first = begin == 0 ? 0 : begin * chunk - early;
        const int64_t last = slab + 1 == slabs ? s.depth : std::min(s.depth, end * chunk - early);
        const Scratch k(scratch + omp_get_thread_num() * size, s, sides);
        double *own = losses + item * s.depth;
        if (zeros) sweep_sides<T, ZEROS>(v, k, first, last, own, s, sides);
        else if (v.mask) sweep_sides<T, MASKED>(v, k, first, last, own, s, sides);
        else sweep_sides<T, COUNT>(v, k, first, last, own, s, sides);
    }
    for (int64_t item = 0; item < batch; item++) {
        double sum = 0, weight = 0;
        for (int64_t z = item * s.depth; z < (item + 1) * s.depth; z++) sum += losses[z], weight += partial[3 * z];
        loss[item] = sum / weight;
    }
}

}  // namespace

extern "C" int64_t lncc_scratch(int64_t depth, int64_t height, int64_t width, int64_t window, int sides) {
    return Scratch::size(Shape{depth, height, width, window}, sides);
}

#define LNCC(NAME, T)                                                                                                  \
    extern "C" void NAME(const T *fixed, const T *moving, const T *mask, const T *upstream, T *map, T *grad_fixed,     \
                         T *grad_moving, double *loss, double *partial, double *scratch, int64_t batch, int64_t depth, \
                         int64_t height, int64_t width, int64_t window, double eps, int zeros, int threads) {          \
        lncc<T>({fixed, moving, mask, upstream, map, grad_fixed, grad_moving, 0, 0, 0, eps}, loss, partial, scratch,   \
                batch, {depth, height, width, window}, zeros, threads);                                                \
    }
LNCC(lncc_float, float)
LNCC(lncc_double, double)
