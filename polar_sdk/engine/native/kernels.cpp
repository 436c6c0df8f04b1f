// Kernels for processors with AVX512-BF16, and the operations under which torch knows them. `__init__.py` compiles this
// file once for each processor, and decides when they are used.
//
// Letters as in `polar_sdk/engine`: M rows, K inputs, N outputs; B rows of one token, H query heads, G key and value
// heads, d head size. Sums are float32; results are rounded to bfloat16, and the weights of attention of a prompt where
// inputs go in pairs.

#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include "integers.h"
#include "layers.h"
#include "pages.h"
#include "products.h"
#include "prompt.h"

TORCH_LIBRARY(polar, library) {
  library.def("product(Tensor x, Tensor panels, Tensor bias, bool pairs, bool team) -> Tensor");
  library.def("product_int8(Tensor x, Tensor panels, Tensor scale, Tensor bias, bool team) -> Tensor");
  library.def("product_int4(Tensor x, Tensor panels, Tensor bias, bool team) -> Tensor");
  library.def(
      "attend_pages(Tensor query, Tensor store, Tensor table, Tensor positions, float scale, int? window, float? "
      "softcap, bool team) -> Tensor");
  library.def("write_pages(Tensor(a!) store, Tensor pages, Tensor offsets, Tensor key, Tensor value) -> ()");
  library.class_<polar::Package>("Package").def(torch::init<std::string>()).def("run", &polar::Package::run);
  library.class_<polar::Layers>("Layers").def(torch::init<>()).def("add", &polar::Layers::add);
  library.def(
      "decode_layers(__torch__.torch.classes.polar.Layers layers, Tensor x, Tensor visits, Tensor bounds, Tensor index, "
      "Tensor table, Tensor positions, Tensor[] rotary, Tensor store, Tensor(a!) done) -> Tensor");
  library.def(
      "attend_prompt(Tensor query, Tensor keys, Tensor values, Tensor? positions, float scale, int? window, float? "
      "softcap, bool pairs) -> Tensor");
}

TORCH_LIBRARY_IMPL(polar, CPU, library) {
  library.impl("product", polar::product);
  library.impl("product_int8", polar::product_int8);
  library.impl("product_int4", polar::product_int4);
  library.impl("attend_pages", polar::attend_pages);
  library.impl("write_pages", polar::write_pages);
  library.impl("attend_prompt", polar::attend_prompt);
  library.impl("decode_layers", polar::decode_layers);
}

// The same for compiled layers, which otherwise find each operation, and box its arguments, at every call.
extern "C" {

AOTITorchError aoti_torch_cpu_product(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle bias, int32_t pairs,
                                      int32_t team, AtenTensorHandle* result) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(polar::product(*tensor_handle_to_tensor_pointer(x),
                                               *tensor_handle_to_tensor_pointer(panels),
                                               *tensor_handle_to_tensor_pointer(bias), pairs != 0, team != 0));
  });
}

AOTITorchError aoti_torch_cpu_product_int8(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle scale,
                                           AtenTensorHandle bias, int32_t team, AtenTensorHandle* result) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(polar::product_int8(*tensor_handle_to_tensor_pointer(x),
                                                    *tensor_handle_to_tensor_pointer(panels),
                                                    *tensor_handle_to_tensor_pointer(scale),
                                                    *tensor_handle_to_tensor_pointer(bias), team != 0));
  });
}

AOTITorchError aoti_torch_cpu_product_int4(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle bias,
                                           int32_t team, AtenTensorHandle* result) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(polar::product_int4(*tensor_handle_to_tensor_pointer(x),
                                                    *tensor_handle_to_tensor_pointer(panels),
                                                    *tensor_handle_to_tensor_pointer(bias), team != 0));
  });
}

AOTITorchError aoti_torch_cpu_attend_pages(AtenTensorHandle query, AtenTensorHandle store, AtenTensorHandle table,
                                           AtenTensorHandle positions, double scale, const int64_t* window,
                                           const double* softcap, int32_t team, AtenTensorHandle* result) {
  using namespace torch::aot_inductor;
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *result = new_tensor_handle(polar::attend_pages(
        *tensor_handle_to_tensor_pointer(query), *tensor_handle_to_tensor_pointer(store),
        *tensor_handle_to_tensor_pointer(table), *tensor_handle_to_tensor_pointer(positions), scale,
        pointer_to_optional<int64_t>(window), pointer_to_optional<double>(softcap), team != 0));
  });
}
}
