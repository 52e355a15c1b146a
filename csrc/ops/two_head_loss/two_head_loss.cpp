#include "ops/two_head_loss/two_head_loss.h"

#include <tuple>

#include "adaptor.h"

namespace pyvitfast {

#if PVF_CPU_KERNELS
PVF_DECLARE_CPU_KERNELS(TwoHeadLossCpu, two_head_loss_cpu)
#else
const char* two_head_loss_cuda(const TwoHeadLoss& p, void* stream);
const char* two_head_loss_backward_cuda(const TwoHeadLoss& p, void* stream);
#endif

namespace {

constexpr const char* kName = "two_head_loss";

using MaybeTensor = std::optional<Tensor>;

// Without a trip through the dispatcher where there is nothing to do.
Tensor dense(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A kernel would read host memory as the device's.
void check_device(const Tensor& tensor, const Tensor& cls, const char* name) {
    STD_TORCH_CHECK(
        tensor.is_cpu() == cls.is_cpu() && tensor.get_device_index() == cls.get_device_index(),
        kName, ": ", name, " must be on the device of the logits");
}

// On CUDA a label out of range is the kernels' affair: looking would wait for the device.
Tensor dense_labels(const Tensor& labels, const Tensor& cls, const char* name) {
    const int64_t rows = cls.size(0);
    [[maybe_unused]] const int64_t classes = cls.size(1);
    check_device(labels, cls, name);
    STD_TORCH_CHECK(
        labels.dim() == 1 && labels.size(0) == rows && labels.scalar_type() == DType::Long, kName,
        ": ", name, " must be int64, one a row");
    const Tensor whole = dense(labels);
#if PVF_CPU_KERNELS
    const auto* values = static_cast<const int64_t*>(whole.data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
        STD_TORCH_CHECK(values[i] >= 0 && values[i] < classes, kName, ": ", name,
                        " must be classes from 0 to ", classes - 1, ", got ", values[i], " in row ",
                        i);
    }
#endif
    return whole;
}

// What forward and backward share; `held` keeps the copies alive.
TwoHeadLoss sized(const Tensor& cls, const Tensor& dist, const Tensor& labels,
                  const MaybeTensor& weights, const MaybeTensor& partners, const MaybeTensor& lam,
                  double alpha, double smoothing, TensorList& held) {
    STD_TORCH_CHECK(cls.dim() == 2 && dist.dim() == 2 && cls.size(0) == dist.size(0) &&
                        cls.size(1) == dist.size(1) && cls.size(1) >= 1,
                    kName, ": both logits must have one shape [B, C], C at least 1");
    STD_TORCH_CHECK(cls.scalar_type() == dist.scalar_type(), kName,
                    ": both logits must have one dtype");
    STD_TORCH_CHECK(cls.size(1) < (int64_t{1} << 31), kName, ": too many classes");
    TwoHeadLoss p{};
    p.type = float_type(kName, cls);
    p.rows = cls.size(0);
    p.classes = cls.size(1);
    p.alpha = alpha;
    p.smoothing = smoothing;
    const auto keep = [&](const Tensor& tensor) {
        held.push_back(tensor);
        return held.back().data_ptr();
    };
    const DType wide = p.type == FloatType::kFloat64 ? DType::Double : DType::Float;
    const auto sums = [&](const Tensor& tensor, const char* name) {
        check_device(tensor, cls, name);
        STD_TORCH_CHECK(tensor.scalar_type() == wide, kName, ": ", name,
                        " must be float32, or float64 beside float64 logits");
        return keep(dense(tensor));
    };
    p.cls = keep(with_dense_rows(cls));
    p.cls_stride = row_stride(held.back());
    p.dist = keep(with_dense_rows(dist));
    p.dist_stride = row_stride(held.back());
    p.labels = static_cast<const int64_t*>(keep(dense_labels(labels, cls, "labels")));
    if (weights.has_value()) {
        STD_TORCH_CHECK(weights->dim() == 1 && weights->size(0) == p.classes, kName,
                        ": weights must have an entry a class");
        p.weights = sums(*weights, "weights");
    }
    STD_TORCH_CHECK(partners.has_value() == lam.has_value(), kName,
                    ": partners and lam go together");
    if (partners.has_value()) {
        p.partners = static_cast<const int64_t*>(keep(dense_labels(*partners, cls, "partners")));
        STD_TORCH_CHECK(lam->numel() == 1 || (lam->dim() == 1 && lam->size(0) == p.rows), kName,
                        ": lam must be one number or one a row");
        p.lam = sums(*lam, "lam");
        p.lam_step = lam->dim() == 1 && lam->size(0) == p.rows ? 1 : 0;
    }
    return p;
}

#if PVF_CPU_KERNELS
template <typename F>
void for_rows(const TwoHeadLoss& p, int64_t first, int64_t last, const F& f) {
    const int64_t grain = std::max<int64_t>(1, 8192 / p.classes);
    torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            f(row);
        }
    });
}

// Whatever the number of threads, losses are added in the order of the rows; a block of rows at a
// time, so that they need no memory but the stack's.
void losses_of(const TwoHeadLossCpu& kernels, const TwoHeadLoss& p, bool choose) {
    constexpr int64_t kBlock = 1024;
    TwoHeadRow losses[kBlock];
    double cls_sum = 0;
    double dist_sum = 0;
    for (int64_t first = 0; first < p.rows; first += kBlock) {
        const int64_t last = std::min(p.rows, first + kBlock);
        for_rows(p, first, last, [&](int64_t row) {
            if (choose) {
                kernels.choose(p, row);
            }
            losses[row - first] = kernels.row(p, row);
        });
        for (int64_t row = first; row < last; ++row) {
            cls_sum += losses[row - first].cls;
            dist_sum += losses[row - first].dist;
        }
    }
    kernels.finish(p, cls_sum, dist_sum);
}
#endif

// statistics: peaks [2, B], sums [2, B], and what the weighted sum was divided by. The CPU makes
// them anew with gradients that it has made once, and keeps the last alone.
void set_statistics(TwoHeadLoss& p, const Tensor& statistics) {
    const int64_t width = p.type == FloatType::kFloat64 ? 8 : 4;
    char* at = static_cast<char*>(statistics.data_ptr());
    if (statistics.numel() > 1) {
        p.peaks = at;
        p.sums = at + 2 * p.rows * width;
    }
    p.total = at + (statistics.numel() - 1) * width;
}

// loss, cls_loss, dist_loss, the teacher's labels, and for the backward pass statistics; with
// `gradients` those of loss, which the CPU makes while a row is in its cache: they are [0, C]
// elsewhere.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> two_head_loss(
    Tensor cls, Tensor dist, Tensor labels, Tensor teacher, MaybeTensor weights,
    MaybeTensor partners, MaybeTensor lam, MaybeTensor divisor, double alpha, double smoothing,
    bool gradients) {
    TensorList held;
    TwoHeadLoss p = sized(cls, dist, labels, weights, partners, lam, alpha, smoothing, held);
    const DType wide = p.type == FloatType::kFloat64 ? DType::Double : DType::Float;
    const bool logits = teacher.dim() == 2;
    const Tensor chosen = empty_quickly(cls, {p.rows}, DType::Long);
    if (logits) {
        STD_TORCH_CHECK(teacher.size(0) == p.rows && teacher.size(1) == p.classes, kName,
                        ": teacher logits must have the shape of the others");
        check_device(teacher, cls, "teacher");
        p.teacher_type = float_type(kName, teacher);
        held.push_back(with_dense_rows(teacher));
        p.teacher = held.back().data_ptr();
        p.teacher_stride = row_stride(held.back());
    } else {
        const Tensor given = dense_labels(teacher, cls, "teacher");
        Tensor copy = chosen;
        torch::stable::copy_(copy, given);
    }
    if (divisor.has_value()) {
        check_device(*divisor, cls, "divisor");
        STD_TORCH_CHECK(divisor->numel() == 1 && divisor->scalar_type() == wide, kName,
                        ": divisor must be one number of the dtype of sums");
        held.push_back(dense(*divisor));
        p.divisor = held.back().data_ptr();
    }
    const bool graded = PVF_CPU_KERNELS && gradients;
    const Tensor statistics = empty_quickly(cls, {graded ? 1 : 4 * p.rows + 1}, wide);
    set_statistics(p, statistics);
    const Tensor loss = empty_quickly(cls, {}, wide);
    const Tensor cls_loss = empty_quickly(cls, {}, wide);
    const Tensor dist_loss = empty_quickly(cls, {}, wide);
    p.chosen = static_cast<int64_t*>(chosen.data_ptr());
    p.loss = loss.data_ptr();
    p.cls_loss = cls_loss.data_ptr();
    p.dist_loss = dist_loss.data_ptr();
    const int64_t graded_rows = graded ? p.rows : 0;
    const Tensor grad_cls = empty_quickly(cls, {graded_rows, p.classes}, cls.scalar_type());
    const Tensor grad_dist = empty_quickly(cls, {graded_rows, p.classes}, cls.scalar_type());
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(two_head_loss_cpu);
    const double one = 1;
    const float narrow_one = 1;
    if (graded) {
        p.grad = wide == DType::Double ? static_cast<const void*>(&one) : &narrow_one;
        p.grad_cls = grad_cls.data_ptr();
        p.grad_dist = grad_dist.data_ptr();
    }
    // What a gradient is divided by depends on the labels of all rows.
    const bool ahead = logits && p.weights != nullptr && p.divisor == nullptr;
    if (ahead) {
        for_rows(p, 0, p.rows, [&](int64_t row) { kernels.choose(p, row); });
    }
    kernels.divide(p);
    losses_of(kernels, p, logits && !ahead);
#else
    const Tensor parts = empty_quickly(cls, {3, p.rows}, wide);
    p.parts = parts.data_ptr();
    check_grid(kName, two_head_loss_blocks(p.rows, p.classes));
    LaunchScope scope(cls);
    check_launch(kName, two_head_loss_cuda(p, scope.stream()));
#endif
    return {loss, cls_loss, dist_loss, chosen, statistics, grad_cls, grad_dist};
}

std::tuple<Tensor, Tensor> two_head_loss_backward(MaybeTensor grad, MaybeTensor grad_c,
                                                  MaybeTensor grad_d, Tensor cls, Tensor dist,
                                                  Tensor labels, Tensor chosen, Tensor statistics,
                                                  MaybeTensor weights, MaybeTensor partners,
                                                  MaybeTensor lam, double alpha, double smoothing) {
    TensorList held;
    TwoHeadLoss p = sized(cls, dist, labels, weights, partners, lam, alpha, smoothing, held);
    const DType wide = p.type == FloatType::kFloat64 ? DType::Double : DType::Float;
    const auto given = [&](const MaybeTensor& tensor) -> const void* {
        if (!tensor.has_value()) {
            return nullptr;
        }
        check_device(*tensor, cls, "gradients of losses");
        STD_TORCH_CHECK(tensor->numel() == 1 && tensor->scalar_type() == wide, kName,
                        ": gradients of losses must be single numbers of the dtype of sums");
        return tensor->data_ptr();
    };
    check_device(statistics, cls, "statistics");
    STD_TORCH_CHECK(
        (statistics.numel() == 4 * p.rows + 1 || (PVF_CPU_KERNELS && statistics.numel() == 1)) &&
            statistics.is_contiguous() && statistics.scalar_type() == wide,
        kName, ": statistics must be those of the forward pass");
    set_statistics(p, statistics);
    const Tensor found = dense_labels(chosen, cls, "teacher");
    const Tensor grad_cls = empty_quickly(cls, {p.rows, p.classes}, cls.scalar_type());
    const Tensor grad_dist = empty_quickly(cls, {p.rows, p.classes}, cls.scalar_type());
    p.chosen = static_cast<int64_t*>(found.data_ptr());
    p.grad = given(grad);
    p.grad_c = given(grad_c);
    p.grad_d = given(grad_d);
    p.grad_cls = grad_cls.data_ptr();
    p.grad_dist = grad_dist.data_ptr();
    if (p.rows == 0) {
        return {grad_cls, grad_dist};
    }
#if PVF_CPU_KERNELS
    const auto& kernels = PVF_CPU_KERNELS_OF(two_head_loss_cpu);
    for_rows(p, 0, p.rows, [&](int64_t row) { kernels.grads(p, row); });
#else
    check_grid(kName, two_head_loss_blocks(p.rows, p.classes));
    LaunchScope scope(cls);
    check_launch(kName, two_head_loss_backward_cuda(p, scope.stream()));
#endif
    return {grad_cls, grad_dist};
}

}  // namespace
}  // namespace pyvitfast

#if PVF_DEFINES_SCHEMAS
STABLE_TORCH_LIBRARY_FRAGMENT(pyvitfast, m) {
    m.def(
        "two_head_loss(Tensor cls_logits, Tensor dist_logits, Tensor labels, Tensor teacher, "
        "Tensor? weights, Tensor? partners, Tensor? lam, Tensor? divisor, float alpha, float "
        "smoothing, bool gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "two_head_loss_backward(Tensor? grad, Tensor? grad_cls_loss, Tensor? grad_dist_loss, "
        "Tensor cls_logits, Tensor dist_logits, Tensor labels, Tensor teacher_labels, Tensor "
        "statistics, Tensor? weights, Tensor? partners, Tensor? lam, float alpha, "
        "float smoothing) -> (Tensor, Tensor)");
}
#endif

PVF_IMPL(m) {
    m.impl("two_head_loss", TORCH_BOX(&pyvitfast::two_head_loss));
    m.impl("two_head_loss_backward", TORCH_BOX(&pyvitfast::two_head_loss_backward));
}
