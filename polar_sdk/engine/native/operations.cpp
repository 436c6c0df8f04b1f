// What compiled layers call: the kernels under the names and with the tensors that torch's compiler knows, and layers
// that run one after another in one call. This depends on torch's own interface of C++, which changes with its version:
// `__init__.py` compiles it beside the layers. Letters as in `kernels.h`.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include "kernels.h"

namespace {

PolarSharing shared(int32_t team) { return {at::get_num_threads(), team}; }

void check(int32_t result) { TORCH_CHECK_WITH(OutOfMemoryError, result == kPolarDone, "no memory for a kernel"); }

const at::Tensor& tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

// The product of rows (M, K) with a matrix of as many outputs as there are in `bias`.
template <class Run>
at::Tensor product(const at::Tensor& x, const at::Tensor& panels, const at::Tensor& bias, const Run& run) {
  TORCH_CHECK(panels.is_contiguous() && bias.is_contiguous());
  const at::Tensor rows = x.contiguous();
  at::Tensor y = at::empty({x.size(0), bias.size(0)}, x.options());
  check(run(rows.const_data_ptr(), panels.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr()));
  return y;
}

at::Tensor attend_pages(const at::Tensor& query, const at::Tensor& store, const at::Tensor& table,
                        const at::Tensor& positions, const PolarKind& kind, int32_t team) {
  TORCH_CHECK(store.is_contiguous() && query.stride(2) == 1 && query.stride(1) == query.size(2));
  const at::Tensor pages = table.contiguous(), at = positions.contiguous();
  at::Tensor mixed = at::empty({query.size(0), query.size(1) * query.size(2)}, query.options());
  check(polar_attend_pages(query.const_data_ptr(), query.stride(0), store.const_data_ptr(),
                           pages.const_data_ptr<int64_t>(), at.const_data_ptr<int64_t>(), mixed.mutable_data_ptr(),
                           query.size(0), query.size(1), store.size(2), query.size(2), store.size(3), table.size(1),
                           kind, shared(team)));
  return mixed;
}

// The code in a package for a whole layer, see `compiled.py`.
struct Package : torch::CustomClassHolder {
  explicit Package(const std::string& path) : loader(path) {}
  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return loader.boxed_run(std::move(inputs)); }
  torch::inductor::AOTIModelPackageLoader loader;
};

// The layers of a model: what runs each, on which weights, and which of the tables of angles it takes.
struct Layers : torch::CustomClassHolder {
  struct Layer {
    c10::intrusive_ptr<Package> package;
    std::vector<at::Tensor> weights;
    int64_t rope;
  };
  void add(const c10::intrusive_ptr<Package>& package, std::vector<at::Tensor> weights, int64_t rope) {
    layers.push_back({package, std::move(weights), rope});
  }
  std::vector<Layer> layers;
};

// Visits of layers, each for some of the tokens (N, E): those at `index`, whose pages and positions are at the same
// places of `table` and `positions`; visit i is for what stands from bounds[i] to bounds[i + 1]. Python would take some
// 10 µs for each, a tenth of a short layer. `done` counts the visits that have run. Returns all states.
at::Tensor decode_layers(const c10::intrusive_ptr<Layers>& own, at::Tensor x, const at::Tensor& visits,
                         const at::Tensor& bounds, const at::Tensor& index, const at::Tensor& table,
                         const at::Tensor& positions, at::TensorList rotary, const at::Tensor& store,
                         const at::Tensor& done) {
  TORCH_CHECK(visits.is_contiguous() && bounds.is_contiguous() && bounds.numel() == visits.numel() + 1);
  const auto* from = bounds.const_data_ptr<int64_t>();
  auto* count = done.mutable_data_ptr<int64_t>();
  for (int64_t visit = 0; visit < visits.numel(); ++visit, ++*count) {
    const Layers::Layer& layer = own->layers.at(visits.const_data_ptr<int64_t>()[visit]);
    const int64_t begin = from[visit], size = from[visit + 1] - begin;
    std::vector<at::Tensor> inputs{std::move(x),
                                   index.narrow(0, begin, size),
                                   rotary.at(2 * layer.rope),
                                   rotary.at(2 * layer.rope + 1),
                                   store,
                                   table.narrow(0, begin, size),
                                   positions.narrow(0, begin, size)};
    inputs.insert(inputs.end(), layer.weights.begin(), layer.weights.end());
    x = std::move(layer.package->loader.boxed_run(std::move(inputs)).at(0));
  }
  return x;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(polar, library) {
  library.class_<Package>("Package").def(torch::init<std::string>()).def("run", &Package::run);
  library.class_<Layers>("Layers").def(torch::init<>()).def("add", &Layers::add);
  library.def(
      "decode_layers(__torch__.torch.classes.polar.Layers layers, Tensor x, Tensor visits, Tensor bounds, Tensor index, "
      "Tensor table, Tensor positions, Tensor[] rotary, Tensor store, Tensor(a!) done) -> Tensor");
}

TORCH_LIBRARY_IMPL(polar, CPU, library) { library.impl("decode_layers", decode_layers); }

// Compiled layers call these by name: torch would find an operation, and box its arguments, at every call.
extern "C" {

AOTITorchError aoti_torch_cpu_product(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle bias, int32_t pairs,
                                      int32_t team, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const at::Tensor &rows = tensor(x), &added = tensor(bias);
    const auto run = [&](const void* from, const void* matrix, const void* own, void* y) {
      return polar_product(from, matrix, own, y, rows.size(0), rows.size(1), added.size(0), pairs, shared(team));
    };
    *result = torch::aot_inductor::new_tensor_handle(product(rows, tensor(panels), added, run));
  });
}

AOTITorchError aoti_torch_cpu_product_int8(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle scale,
                                           AtenTensorHandle bias, int32_t team, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const at::Tensor &rows = tensor(x), &added = tensor(bias);
    TORCH_CHECK(tensor(scale).is_contiguous());
    const auto run = [&](const void* from, const void* matrix, const void* own, void* y) {
      return polar_product_integers(from, matrix, tensor(scale).const_data_ptr(), own, y, rows.size(0), rows.size(1),
                                    added.size(0), shared(team));
    };
    *result = torch::aot_inductor::new_tensor_handle(product(rows, tensor(panels), added, run));
  });
}

AOTITorchError aoti_torch_cpu_product_int4(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle bias,
                                           int32_t team, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const at::Tensor &rows = tensor(x), &added = tensor(bias);
    const auto run = [&](const void* from, const void* matrix, const void* own, void* y) {
      return polar_product_integers(from, matrix, nullptr, own, y, rows.size(0), rows.size(1), added.size(0),
                                    shared(team));
    };
    *result = torch::aot_inductor::new_tensor_handle(product(rows, tensor(panels), added, run));
  });
}

AOTITorchError aoti_torch_cpu_attend_pages(AtenTensorHandle query, AtenTensorHandle store, AtenTensorHandle table,
                                           AtenTensorHandle positions, double scale, const int64_t* window,
                                           const double* softcap, int32_t team, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const PolarKind kind{scale, softcap ? *softcap : 0.0, window ? *window : 0};
    *result = torch::aot_inductor::new_tensor_handle(
        attend_pages(tensor(query), tensor(store), tensor(table), tensor(positions), kind, team));
  });
}
}
