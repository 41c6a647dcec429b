#include "bindings/register.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of kimi_core. It does not link libtorch.";
  kimi::register_attention(m);
  kimi::register_base(m);
  kimi::register_buffer(m);
  kimi::register_loss(m);
  kimi::register_text(m);
  kimi::register_weights(m);
}
