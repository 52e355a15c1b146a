#include "ops/few_query_attention/few_query_attention.h"
#include "portable/attention_device.h"

namespace pyvitfast {

extern const AttentionCuda few_query_attention_cuda;
const AttentionCuda few_query_attention_cuda{launch_attention_forward, launch_attention_backward};

}  // namespace pyvitfast
