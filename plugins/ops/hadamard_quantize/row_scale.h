// How a row is quantized once its statistic is known: shared by C++ and CUDA, free of any header.
#pragma once

#if defined(__CUDACC_RTC__)
#define D2D_BOTH __device__ inline
#else
#define D2D_BOTH inline
#endif

namespace d2d {

// What t is multiplied with before it is rounded (0: all codes are 0), and the s of the row. Codes q of a
// mid-tread grid are rint(t * scale), those of a mid-rise grid the odd integers 2 * floor(t * scale) + 1, both
// within -qmax..qmax; x is about q * s either way.
struct RowScale {
    float scale;
    float s;
};

// MSE-optimal s of a unit normal for odd codes -qmax..qmax: of the largest tabled qmax that is not above; as in
// Python.
D2D_BOTH float mid_rise_step(float qmax) {
    if (qmax >= 127.0f) return 0.028434f;
    if (qmax >= 63.0f) return 0.0520315f;
    if (qmax >= 31.0f) return 0.0940695f;
    if (qmax >= 15.0f) return 0.1676005f;
    if (qmax >= 7.0f) return 0.2930095f;
    if (qmax >= 3.0f) return 0.4978435f;
    return 0.797885f;
}

// The same for all codes -qmax..qmax.
D2D_BOTH float mid_tread_step(float qmax) {
    if (qmax >= 127.0f) return 0.030870f;
    if (qmax >= 63.0f) return 0.057261f;
    if (qmax >= 31.0f) return 0.105488f;
    if (qmax >= 15.0f) return 0.193249f;
    if (qmax >= 7.0f) return 0.353411f;
    if (qmax >= 3.0f) return 0.650770f;
    return 1.224006f;
}

// statistic: the largest |t| of the row, or its root mean square; NaN or inf where the row is not finite. packed: of codes
// of 4 bits, which hold none of a qmax of 8 or more: such rows are as those that are not finite.
D2D_BOTH RowScale row_scale(float statistic, float qmax, bool gaussian, bool mid_rise, float norm,
                            bool packed = false) {
    if (!(statistic <= 3.402823466e+38f))
        return {0.0f, statistic - statistic};  // inf - inf and NaN - NaN are NaN
    if (packed && !(qmax < 8.0f)) return {0.0f, 0.0f / (0.0f * statistic)};  // NaN
    if (statistic < 1e-30f) return {0.0f, 0.0f};
    const float share = mid_rise ? 0.5f : 1.0f;  // of a step between codes: odd codes lie two apart
    if (gaussian) {
        const float step = (mid_rise ? mid_rise_step(qmax) : mid_tread_step(qmax)) * statistic;
        return {1.0f / step * share, step * norm};
    }
    return {qmax / statistic * share, statistic / qmax * norm};
}

}  // namespace d2d
