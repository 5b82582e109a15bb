// Runs an AOTInductor package (.pt2) with ops of fused_conv_bn in it, without Python:
//
//   run_package [--out FILE] [--time CALLS] LIBRARY PACKAGE [INPUT...]
//
// LIBRARY is the package's _cpu.so; for models on CUDA it is followed by the CUDA library: _cpu.so:_cu13.so. PACKAGE is what
// torch._inductor.aoti_compile_and_package wrote. Each INPUT is a tensor that torch.save wrote; without any, the package is
// loaded and not run. It prints a line for each result, and writes the tuple of them to the FILE of --out, for torch.load.
#include <ATen/core/grad_mode.h>
#include <dlfcn.h>
#include <elf.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "archive.h"

namespace {

using Package = torch::inductor::AOTIModelPackageLoader;

constexpr const char* kUsage = "run_package [--out FILE] [--time CALLS] LIBRARY[:LIBRARY] PACKAGE [INPUT...]";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string libraries, package, out;
  std::vector<std::string> inputs;
  int calls = 0;  // to be timed
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(word);
      continue;
    }
    if ((word != "--out" && word != "--time") || i + 1 == argc)
      throw UsageError(word + (word == "--out" || word == "--time" ? " needs a value" : " is no option"));
    const std::string value = argv[++i];
    if (word == "--out") {
      arguments.out = value;
    } else if ((arguments.calls = std::atoi(value.c_str())) < 1) {
      throw UsageError("--time is " + value + ", expected a number of calls");
    }
  }
  if (files.size() < 2) throw UsageError("a LIBRARY and a PACKAGE are needed");
  arguments.libraries = files[0];
  arguments.package = files[1];
  arguments.inputs.assign(files.begin() + 2, files.end());
  return arguments;
}

// The first line: without the C++ stack and the list of a package's files that PyTorch puts behind its messages.
std::string message_of(const std::exception& error) {
  const auto* torchs = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torchs != nullptr ? torchs->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

void check_is_file(const std::string& what, const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(what + " " + path + " is not a file");
}

// A library that ends before its section headers do would end the process when it is opened.
bool is_whole_library(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<char, sizeof(Elf64_Ehdr)> bytes{};
  if (!file.read(bytes.data(), bytes.size())) return false;
  const auto header = std::bit_cast<Elf64_Ehdr>(bytes);
  const uint64_t end = header.e_shoff + uint64_t{header.e_shentsize} * header.e_shnum;
  return std::memcmp(header.e_ident, ELFMAG, SELFMAG) == 0 && end <= std::filesystem::file_size(path);
}

// A library registers its ops with libtorch when it is opened. It stays open: the ops are its code.
void load_libraries(const std::string& paths) {
  std::istringstream list(paths);
  for (std::string path; std::getline(list, path, ':');) {
    check_is_file("the library", path);
    if (!is_whole_library(path)) throw std::runtime_error("the library " + path + " is no library, or is not whole");
    // Without a slash the linker would look for the name in its own folders.
    if (dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr)
      throw std::runtime_error("the library " + path + " cannot be loaded: " + dlerror());
  }
}

std::unique_ptr<Package> load_package(const std::string& path) {
  check_is_file("the package", path);
  try {
    Archive(path).check();
    return std::make_unique<Package>(path);
  } catch (const std::exception& error) {
    throw std::runtime_error("the package " + path + " cannot be loaded: " + message_of(error));
  }
}

at::Tensor read_tensor(const std::string& path) {
  check_is_file("the input", path);
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> data{std::istreambuf_iterator<char>(file), {}};
  try {
    const c10::IValue value = torch::jit::pickle_load(data);
    if (value.isTensor()) return value.toTensor();
  } catch (const std::exception&) {
  }
  throw std::runtime_error("the input " + path + " is not a tensor that torch.save wrote");
}

// As a tuple: what is saved of a list is nothing that torch.load takes as data.
void write_tensors(const std::string& path, const std::vector<at::Tensor>& tensors) {
  const std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> data = torch::jit::pickle_save(c10::ivalue::Tuple::create(values));
  std::ofstream file(path, std::ios::binary);
  file.write(data.data(), static_cast<std::streamsize>(data.size()));
  file.close();  // a full disk may show no sooner
  if (!file) throw std::runtime_error("the results cannot be written to " + path);
}

// The median of what single calls took, in microseconds. On CUDA that is the host's time: a call does not wait.
double median_time(Package& package, const std::vector<at::Tensor>& inputs, int calls) {
  std::vector<double> times;
  for (int i = 0; i < calls + calls / 10; ++i) {  // the first ones warm up
    const auto begin = std::chrono::steady_clock::now();
    package.run(inputs);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    if (i >= calls / 10) times.push_back(took.count());
  }
  std::nth_element(times.begin(), times.begin() + calls / 2, times.end());
  return times[calls / 2];
}

void run(const Arguments& arguments) {
  // Before the package: that looks its ops up when it is loaded.
  load_libraries(arguments.libraries);
  const std::unique_ptr<Package> package = load_package(arguments.package);
  if (arguments.inputs.empty()) {
    std::cout << "loaded, with " << package->get_constant_fqns().size() << " constants\n";
    return;
  }
  std::vector<at::Tensor> inputs;
  for (const std::string& path : arguments.inputs) inputs.push_back(read_tensor(path));

  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> results = package->run(inputs);
  for (const at::Tensor& result : results)
    std::cout << result.toString() << result.sizes() << ", mean " << result.to(at::kDouble).mean().item<double>()
              << '\n';
  if (!arguments.out.empty()) write_tensors(arguments.out, results);
  if (arguments.calls > 0) std::cout << median_time(*package, inputs, arguments.calls) << " us\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const UsageError& error) {
    std::cerr << "run_package: " << error.what() << ": " << kUsage << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "run_package: " << message_of(error) << '\n';
    return 1;
  }
  return 0;
}
