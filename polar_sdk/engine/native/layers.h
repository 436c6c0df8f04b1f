// Compiled layers run one after another in one call.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include "lanes.h"

namespace polar {

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
inline at::Tensor decode_layers(const c10::intrusive_ptr<Layers>& own, at::Tensor x, const at::Tensor& visits,
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

}  // namespace polar
