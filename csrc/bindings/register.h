// One function for each folder of the core; it adds the classes of that folder to kimi_core._C.
#ifndef KIMI_BINDINGS_REGISTER_H_
#define KIMI_BINDINGS_REGISTER_H_

#include <pybind11/pybind11.h>

namespace kimi {

void register_attention(pybind11::module_& m);
void register_base(pybind11::module_& m);
void register_buffer(pybind11::module_& m);
void register_loss(pybind11::module_& m);
void register_text(pybind11::module_& m);
void register_weights(pybind11::module_& m);

}  // namespace kimi

#endif  // KIMI_BINDINGS_REGISTER_H_
