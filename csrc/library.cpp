#include "adaptor.h"

// Owns the namespace, so that loading a second library with the schemas fails loudly.
STABLE_TORCH_LIBRARY(pyvitfast, m) { (void)m; }
