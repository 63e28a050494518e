// How a row is quantized once its statistic is known: shared by C++ and CUDA, free of any header.
#pragma once

#if defined(__CUDACC_RTC__)
#define D2D_BOTH __device__ inline
#else
#define D2D_BOTH inline
#endif

namespace d2d {

// What t is multiplied with (0: all codes are 0), and the step s of the row.
struct RowScale {
    float scale;
    float s;
};

// MSE-optimal step of a unit normal for codes -qmax..qmax: of the largest tabled qmax that is not above; as
// in Python.
D2D_BOTH float gaussian_step(float qmax) {
    if (qmax >= 127.0f) return 0.030870f;
    if (qmax >= 63.0f) return 0.057261f;
    if (qmax >= 31.0f) return 0.105488f;
    if (qmax >= 15.0f) return 0.193249f;
    if (qmax >= 7.0f) return 0.353411f;
    if (qmax >= 3.0f) return 0.650770f;
    return 1.224006f;
}

// statistic: the largest |t| of the row, or its root mean square; NaN or inf where the row is not finite.
D2D_BOTH RowScale row_scale(float statistic, float qmax, bool gaussian, float norm) {
    if (!(statistic <= 3.402823466e+38f))
        return {0.0f, statistic - statistic};  // inf - inf and NaN - NaN are NaN
    if (statistic < 1e-30f) return {0.0f, 0.0f};
    if (gaussian) {
        const float step = gaussian_step(qmax) * statistic;
        return {1.0f / step, step * norm};
    }
    return {qmax / statistic, statistic / qmax * norm};
}

}  // namespace d2d
