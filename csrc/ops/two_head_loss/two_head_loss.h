#pragma once

#include <cstdint>

#include "float_type.h"
#include "portable/platform.h"

namespace pyvitfast {

// T is the type of logits, A that of sums: double for double, else float.
struct TwoHeadLoss {
    const void* cls;  // T [rows, classes], as dist; a row's entries are neighbours
    const void* dist;
    int64_t cls_stride;
    int64_t dist_stride;
    const int64_t* labels;
    const int64_t* partners;  // or null
    const void* lam;          // A: share of the labels; with partners
    int64_t lam_step;         // 0: one for all rows
    const void* teacher;      // logits [rows, classes] of teacher_type, or null: labels are chosen
    int64_t teacher_stride;
    FloatType teacher_type;
    int64_t* chosen;      // the teacher's labels; written where there are logits
    const void* weights;  // A [classes], or null
    const void* divisor;  // A: of the weighted sum; null: the sum of weights
    void* peaks;          // A [2, rows]: greatest logit of each head; CPU: null where not kept
    void* sums;           // A [2, rows]: of exp(logit - peak)
    void* parts;          // CUDA: A [3, rows]: CLS loss, weighted DIST loss, weight
    void* loss;           // A
    void* cls_loss;
    void* dist_loss;
    void* total;         // A: what the weighted sum was divided by
    const void* grad;    // A, of loss; backward, or null: none, as the next two
    const void* grad_c;  // of cls_loss
    const void* grad_d;  // of dist_loss
    void* grad_cls;      // T [rows, classes]
    void* grad_dist;
    int64_t rows;
    int64_t classes;
    double alpha;
    double smoothing;
    FloatType type;
};

constexpr int64_t kTwoHeadWarpClasses = 1024;  // up to so many a warp takes a row, else a block
constexpr int kTwoHeadThreads = 256;

PVF_HOST_DEVICE int64_t two_head_loss_blocks(int64_t rows, int64_t classes) {
    const int64_t rows_of_block = classes <= kTwoHeadWarpClasses ? kTwoHeadThreads / 32 : 1;
    return (rows + rows_of_block - 1) / rows_of_block;
}

struct TwoHeadRow {
    double cls;
    double dist;  // weighted
};

struct TwoHeadLossCpu {
    void (*choose)(const TwoHeadLoss&, int64_t row);
    void (*divide)(const TwoHeadLoss&);  // total, from the labels chosen
    // Also the gradients, where there is a place for them.
    TwoHeadRow (*row)(const TwoHeadLoss&, int64_t row);
    void (*finish)(const TwoHeadLoss&, double cls_sum, double dist_sum);
    void (*grads)(const TwoHeadLoss&, int64_t row);
};

}  // namespace pyvitfast
