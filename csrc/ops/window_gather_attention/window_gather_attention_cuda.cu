#include "ops/window_gather_attention/window_gather_attention.h"
#include "portable/attention_device.h"

namespace pyvitfast {

extern const AttentionCuda window_gather_attention_cuda;
const AttentionCuda window_gather_attention_cuda{launch_attention_forward,
                                                 launch_attention_backward};

}  // namespace pyvitfast
