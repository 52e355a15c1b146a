#include "cpu_attention.h"
#include "ops/window_gather_attention/window_gather_attention.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

PVF_ATTENTION_CPU(forward)
PVF_ATTENTION_CPU(combine)
PVF_ATTENTION_CPU(prepare)
PVF_ATTENTION_CPU(key_slopes, false)
PVF_ATTENTION_CPU(query_slopes, false)

extern const AttentionCpu window_gather_attention_cpu;
const AttentionCpu window_gather_attention_cpu{forward, combine, prepare, key_slopes, query_slopes};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
