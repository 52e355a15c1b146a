#include "cpu_attention.h"
#include "ops/few_query_attention/few_query_attention.h"

namespace pyvitfast::PVF_CPU_CAPABILITY {

PVF_ATTENTION_CPU(forward)
PVF_ATTENTION_CPU(combine)
PVF_ATTENTION_CPU(prepare)
PVF_ATTENTION_CPU(key_slopes, true)
PVF_ATTENTION_CPU(query_slopes, true)

extern const AttentionCpu few_query_attention_cpu;
const AttentionCpu few_query_attention_cpu{forward, combine, prepare, key_slopes, query_slopes};

}  // namespace pyvitfast::PVF_CPU_CAPABILITY
