// Functions of the native library (`kernels.h`) beside plain scalar ones in float64, on numbers that are drawn here. It is
// linked with one kind of library and needs neither Python nor torch: so it runs under an emulator too. For each group
// of functions it prints how many numbers were compared, the largest error as a share of the tolerance, and a digest of
// all results, by which two kinds of library can be compared to the bit. Ends with 1 where a number is out of tolerance.

#include <kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

namespace {

using Half = uint16_t;  // the bits of a bfloat16
using Halves = std::vector<Half>;
using Doubles = std::vector<double>;

Half half(double number) {
  const auto bits = __builtin_bit_cast(uint32_t, static_cast<float>(number));
  return static_cast<Half>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double wide(Half bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t bits = state_ += 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  double uniform() { return static_cast<double>(next() >> 11) / (uint64_t{1} << 53); }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  Halves halves(int64_t count, double by = 1, double around = 0) {
    Halves made(count);
    for (auto& each : made) each = half(around + by * normal());
    return made;
  }

 private:
  uint64_t state_;
};

// A group of functions: what was compared so far.
class Group {
 public:
  explicit Group(const char* name) : name_(name) {}
  ~Group() {
    std::printf("%s: %ld compared, largest error %.3f of the tolerance, digest %016lx\n", name_, compared_, largest_,
                static_cast<unsigned long>(digest_));
    std::fflush(stdout);
    failed |= !(largest_ <= 1);
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void compare(double got, double expected, double tolerance) {
    const double error = std::abs(got - expected) / tolerance;
    largest_ = error <= largest_ ? largest_ : error;  // stays none where it is no number
    ++compared_;
  }
  // A result of one rounding to bfloat16 of a sum of terms of this size together.
  void rounded(Half got, double expected, double size) {
    digest(got);
    compare(wide(got), expected, std::abs(expected) * 0x1p-8 + size * 0x1p-18 + 1e-30);
  }
  void single(float got, double expected, double tolerance) {
    digest(__builtin_bit_cast(uint32_t, got));
    compare(got, expected, tolerance);
  }
  void same(bool is) { compare(is ? 0 : 2, 0, 1); }
  void digest(uint64_t number) { digest_ = (digest_ ^ number) * 0x100000001b3; }
  void done(int32_t result) { same(result == kPolarDone); }

  static inline bool failed = false;

 private:
  const char* name_;
  long compared_ = 0;
  double largest_ = 0;
  uint64_t digest_ = 0xcbf29ce484222325;
};

int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// -- matrices --------------------------------------------------------------------------------------------------------

constexpr int64_t kGroup = 32, kOutputs = 16;

// A matrix (N, K) in panels, and what it stands for.
struct Matrix {
  int32_t form;
  int64_t outputs, inputs;
  Doubles weight;
  std::vector<uint8_t> panels;
  Halves scale, bias;
  int32_t fine = 0;

  PolarMatrix view() const {
    return {panels.data(), scale.empty() ? nullptr : scale.data(), bias.data(), inputs, outputs, nullptr, form, fine};
  }
  double of(int64_t output, int64_t input) const { return weight[output * inputs + input]; }
};

Matrix numbers(const Halves& weight, int64_t outputs, int64_t inputs, const Halves& bias) {
  constexpr int64_t kPanel = 32;
  const int64_t pairs = (inputs + 1) / 2;
  Matrix made{kPolarNumbers, outputs, inputs, Doubles(outputs * inputs), {}, {}, bias};
  Halves panels(up_to(outputs, kPanel) * pairs * 2);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      made.weight[n * inputs + k] = wide(weight[n * inputs + k]);
      panels[(n / kPanel * pairs + k / 2) * 2 * kPanel + n % kPanel * 2 + k % 2] = weight[n * inputs + k];
    }
  }
  made.panels.resize(panels.size() * sizeof(Half));
  std::memcpy(made.panels.data(), panels.data(), made.panels.size());
  return made;
}

// `code(n, k)` from 0 to 255, less 128.
Matrix bytes(const std::function<int(int64_t, int64_t)>& code, int64_t outputs, int64_t inputs, const Halves& scale,
             const Halves& bias) {
  const int64_t groups = up_to(inputs, kGroup) / kGroup;
  Matrix made{kPolarBytes, outputs, inputs, Doubles(outputs * inputs), {}, scale, bias};
  made.panels.assign(up_to(outputs, kOutputs) * groups * kGroup, 128);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      const int64_t word = k % kGroup / 4, at = (n / kOutputs * groups + k / kGroup) * kGroup * kOutputs;
      made.panels[at + (word * kOutputs + n % kOutputs) * 4 + k % 4] = static_cast<uint8_t>(code(n, k));
      made.weight[n * inputs + k] = (code(n, k) - 128) * wide(scale[n]);
    }
  }
  return made;
}

// `code(n, k)` from 0 to 15; scales and zeros (K / 32, N, 2).
Matrix nibbles(const std::function<int(int64_t, int64_t)>& code, int64_t outputs, int64_t inputs, const Halves& numbers,
               const Halves& bias) {
  const int64_t groups = inputs / kGroup, size = kGroup * kOutputs / 2 + 4 * kOutputs;
  Matrix made{kPolarNibbles, outputs, inputs, Doubles(outputs * inputs), {}, {}, bias};
  made.panels.assign(outputs / kOutputs * groups * size, 0);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      uint8_t* group = made.panels.data() + (n / kOutputs * groups + k / kGroup) * size;
      const Half* own = numbers.data() + (k / kGroup * outputs + n) * 2;
      const int64_t word = k % kGroup / 4;
      group[(word / 2 * kOutputs + n % kOutputs) * 4 + k % 4] |= static_cast<uint8_t>(code(n, k) << 4 * (word % 2));
      std::memcpy(group + kGroup * kOutputs / 2 + n % kOutputs * 2 * sizeof(Half), own, 2 * sizeof(Half));
      made.weight[n * inputs + k] = (code(n, k) - 8) * wide(own[0]) + wide(own[1]);
    }
  }
  return made;
}

// -- blocks of GGUF files, read as their specification has it ----------------------------------------------------------

double ieee_half(const uint8_t* from) {
  const int bits = from[0] | from[1] << 8, exponent = bits >> 10 & 31, rest = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
  return bits >> 15 ? -size : size;
}

struct Format {
  int32_t form;
  const char* name;
  int64_t inputs, bytes;
  std::vector<int> halves;  // where numbers of IEEE's 16 bits are
  double (*weight)(const uint8_t* block, int input);
};

int half_byte(const uint8_t* codes, int input) { return input < 16 ? codes[input] & 15 : codes[input - 16] >> 4; }
int bit(const uint8_t* bits, int place) { return bits[place / 8] >> place % 8 & 1; }

// Scale (0) or minimum (1), of six bits, of a group of 32 of 256.
int six_bits(const uint8_t* scales, int group, int which) {
  const uint8_t* own = scales + 4 * which;
  if (group < 4) return own[group] & 63;
  return (which ? scales[group + 4] >> 4 : scales[group + 4] & 15) | own[group - 4] >> 6 << 4;
}

double nested(const uint8_t* block, int input, int code) {
  const int group = input / 32;
  return ieee_half(block) * six_bits(block + 4, group, 0) * code - ieee_half(block + 2) * six_bits(block + 4, group, 1);
}

const std::vector<Format> kFormats = {
    {kPolarQ4_0, "Q4_0", 32, 18, {0}, [](const uint8_t* b, int i) { return ieee_half(b) * (half_byte(b + 2, i) - 8); }},
    {kPolarQ4_1, "Q4_1", 32, 20, {0, 2},
     [](const uint8_t* b, int i) { return ieee_half(b) * half_byte(b + 4, i) + ieee_half(b + 2); }},
    {kPolarQ5_0, "Q5_0", 32, 22, {0},
     [](const uint8_t* b, int i) { return ieee_half(b) * ((half_byte(b + 6, i) | bit(b + 2, i) << 4) - 16); }},
    {kPolarQ5_1, "Q5_1", 32, 24, {0, 2},
     [](const uint8_t* b, int i) {
       return ieee_half(b) * (half_byte(b + 8, i) | bit(b + 4, i) << 4) + ieee_half(b + 2);
     }},
    {kPolarQ8_0, "Q8_0", 32, 34, {0},
     [](const uint8_t* b, int i) { return ieee_half(b) * static_cast<int8_t>(b[2 + i]); }},
    {kPolarQ4_K, "Q4_K", 256, 144, {0, 2},
     [](const uint8_t* b, int i) {
       return nested(b, i, b[16 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15);
     }},
    {kPolarQ5_K, "Q5_K", 256, 176, {0, 2},
     [](const uint8_t* b, int i) {
       const int low = b[48 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15;
       return nested(b, i, low | (b[16 + i % 32] >> i / 32 & 1) << 4);
     }},
    {kPolarQ6_K, "Q6_K", 256, 210, {208},
     [](const uint8_t* b, int i) {
       const int part = i / 128, quarter = i % 128 / 32, place = i % 32;
       const int low = b[64 * part + 32 * (quarter % 2) + place] >> 4 * (quarter / 2) & 15;
       const int high = b[128 + 32 * part + place] >> 2 * quarter & 3;
       return ieee_half(b + 208) * static_cast<int8_t>(b[192 + i / 16]) * ((low | high << 4) - 32);
     }},
};

// A file of these bytes.
class OpenFile {
 public:
  explicit OpenFile(const std::vector<uint8_t>& bytes) : file_(std::tmpfile()) {
    std::fwrite(bytes.data(), 1, bytes.size(), file_);
    std::fflush(file_);
  }
  OpenFile(const OpenFile&) = delete;
  ~OpenFile() { std::fclose(file_); }
  int number() const { return fileno(file_); }

 private:
  std::FILE* file_;
};

// A matrix of random blocks, brought into panels by the library, of some of the rows in any order.
Matrix of_file(const Format& format, int64_t outputs, int64_t inputs, Random& random, double by) {
  const int64_t row_bytes = inputs / format.inputs * format.bytes, rows = outputs + 3;
  std::vector<uint8_t> file(rows * row_bytes);
  for (auto& each : file) each = static_cast<uint8_t>(random.next() >> 30);
  const bool small_scales = format.inputs == 256;  // what they are multiplied with is up to 63, or 128
  for (int64_t block = 0; block < rows * inputs / format.inputs; ++block) {
    for (const int at : format.halves) {
      // An exponent about right for weights of size `by`, a sign, and ten bits as they are; some are denormal.
      const int exponent = std::max(0, 12 + std::ilogb(by) - (small_scales ? 5 : 0) - static_cast<int>(random.below(3)));
      uint8_t* own = file.data() + block * format.bytes + at;
      own[1] = static_cast<uint8_t>((own[1] & 0x83) | exponent << 2);
    }
  }
  std::vector<int64_t> order(outputs);
  for (int64_t n = 0; n < outputs; ++n) order[n] = outputs + 2 - n;
  Matrix made{format.form, outputs, inputs, Doubles(outputs * inputs), {}, {}, random.halves(outputs, by)};
  made.panels.resize(polar_packed_size(format.form, inputs, outputs));
  const OpenFile stored(file);
  const int32_t packed =
      polar_pack(format.form, stored.number(), 0, order.data(), inputs, outputs, made.panels.data(), {2, 1});
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      const uint8_t* block = file.data() + order[n] * row_bytes + k / format.inputs * format.bytes;
      made.weight[n * inputs + k] = packed == kPolarDone ? format.weight(block, static_cast<int>(k % format.inputs)) : NAN;
    }
  }
  return made;
}

// One of each form, drawn.
Matrix drawn(int32_t form, int64_t outputs, int64_t inputs, Random& random, double by = 1) {
  for (const Format& format : kFormats) {
    if (format.form == form) return of_file(format, outputs, inputs, random, by);
  }
  const Halves bias = random.halves(outputs, by);
  if (form == kPolarNumbers) return numbers(random.halves(outputs * inputs, by), outputs, inputs, bias);
  std::vector<uint8_t> codes(outputs * inputs);
  for (auto& each : codes) each = static_cast<uint8_t>(random.below(form == kPolarBytes ? 256 : 16));
  const auto code = [&](int64_t n, int64_t k) { return codes[n * inputs + k]; };
  if (form == kPolarBytes) return bytes(code, outputs, inputs, random.halves(outputs, by / 600, by / 70), bias);
  return nibbles(code, outputs, inputs, random.halves(outputs * inputs / kGroup * 2, by / 9, by / 9), bias);
}

// A row whose largest numbers are a thousand times the others, as in real models.
Halves uneven(int64_t rows, int64_t inputs, Random& random) {
  Halves made = random.halves(rows * inputs);
  for (int64_t at = 0; at < rows * inputs; at += 37) made[at] = half(wide(made[at]) * 1000);
  return made;
}

// A row as a product reads it: for blocks of a file as 8-bit integers, some of which share a scale, and with two planes
// what these lack, once more.
Doubles read(const Half* x, const Matrix& matrix, int planes = 1) {
  constexpr int64_t kShare = 16;
  Doubles row(matrix.inputs);
  for (int64_t k = 0; k < matrix.inputs; ++k) row[k] = wide(x[k]);
  if (matrix.form < kPolarQ4_0) return row;
  Doubles near(matrix.inputs);
  for (int plane = 0; plane < planes; ++plane) {
    for (int64_t begin = 0; begin < matrix.inputs; begin += kShare) {
      float largest = 0;
      for (int64_t k = begin; k < begin + kShare; ++k) largest = std::max(largest, std::abs(static_cast<float>(row[k])));
      for (int64_t k = begin; largest > 0 && k < begin + kShare; ++k) {
        const double integer = std::nearbyint(static_cast<float>(row[k]) * (127.0f / largest));
        const double own = integer * static_cast<double>(largest / 127.0f);
        near[k] += own;
        row[k] = static_cast<float>(row[k] - own);
      }
    }
  }
  return near;
}

double dot(const Doubles& x, const Matrix& matrix, int64_t output) {
  double sum = wide(matrix.bias[output]);
  for (int64_t k = 0; k < matrix.inputs; ++k) sum += x[k] * matrix.of(output, k);
  return sum;
}

// How large the terms of such a sum are. Integers of rows are within 2⁻¹⁶ of the largest number of their group where
// there are 16 bits, and many rows may meet integer weights that were rounded to bfloat16.
double size_of(const Doubles& x, const Matrix& matrix, int64_t output, bool many) {
  double size = std::abs(wide(matrix.bias[output])) + 1;
  for (int64_t begin = 0; begin < matrix.inputs; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, matrix.inputs);
    double largest = 0;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, std::abs(x[k]));
    for (int64_t k = begin; k < end; ++k) {
      const double weight = std::abs(matrix.of(output, k)), own = std::abs(x[k]);
      size += weight * (matrix.form == kPolarNumbers ? own : 4 * largest);
      if (many && matrix.form == kPolarNibbles) size += weight * own * 0x1p10;
    }
  }
  return size;
}

constexpr int64_t kMany = 32;  // rows up to which integer weights surely stay integers

void check_product(Group& group, const Matrix& matrix, int64_t rows, int32_t pairs, PolarSharing sharing,
                   Random& random) {
  const Halves x = uneven(rows, matrix.inputs, random);
  const PolarMatrix view = matrix.view();
  Halves y(rows * matrix.outputs);
  std::vector<float> logits(rows * matrix.outputs);
  group.done(polar_product(&view, x.data(), y.data(), nullptr, rows, pairs, sharing));
  group.done(polar_product(&view, x.data(), nullptr, logits.data(), rows, pairs, sharing));
  for (int64_t row = 0; row < rows; ++row) {
    const Half* numbers = x.data() + row * matrix.inputs;
    const Doubles own = read(numbers, matrix), fine = read(numbers, matrix, 2);
    const auto first = logits.begin() + row * matrix.outputs;
    const auto [least, most] = std::minmax_element(first, first + matrix.outputs);
    for (int64_t n = 0; n < matrix.outputs; ++n) {
      const double expected = dot(own, matrix, n), size = size_of(own, matrix, n, rows > kMany);
      const int64_t at = row * matrix.outputs + n;
      group.rounded(y[at], expected, size);
      if (!matrix.fine) {
        group.single(logits[at], expected, size * 0x1p-18);
        group.same(y[at] == half(logits[at]));
      } else if (logits[at] >= *most - (*most - *least) / 20) {
        group.single(logits[at], dot(fine, matrix, n), size * 0x1p-18);
      } else {  // computed with the others of its panel, or not
        group.single(logits[at], expected, size * 0x1p-7);
      }
    }
  }
  // A row is the same whatever rows are beside it, to the bit.
  for (const int64_t first : {int64_t{0}, rows / 2}) {
    const int64_t count = rows > kMany ? std::min(rows - first, kMany + 1) : std::min<int64_t>(rows - first, 1);
    if (rows > kMany && count <= kMany) continue;
    std::vector<float> alone(count * matrix.outputs);
    group.done(polar_product(&view, x.data() + first * matrix.inputs, nullptr, alone.data(), count, pairs, sharing));
    group.same(std::memcmp(alone.data(), logits.data() + first * matrix.outputs, alone.size() * sizeof(float)) == 0);
  }
}

void check_products(int32_t form, const char* name) {
  Group group(name);
  Random random(form + 1);
  const bool whole = form == kPolarNibbles;  // whole panels and groups
  for (const int64_t rows : {1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 31, 33, 50, 70}) {
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{1, 1}, {16, 32}, {33, 31}, {100, 130}, {48, 323}}) {
      const Matrix matrix =
          drawn(form, whole ? up_to(outputs, kOutputs) : outputs, whole ? up_to(inputs, kGroup) : inputs, random);
      for (const int32_t pairs : form == kPolarNumbers ? std::vector<int32_t>{0, 1} : std::vector<int32_t>{0}) {
        check_product(group, matrix, rows, pairs, {static_cast<int32_t>(1 + random.below(3)), 1}, random);
      }
    }
  }
}

// Rows that are integers without rounding: then sums over integers are exact, at the ends of their range as well.
void check_exactness() {
  Group group("exact sums of integers");
  Random random(9);
  constexpr int64_t kInputs = 96, kRowsOfAll = 7;
  const double ends[] = {127, -127, 63.5, -63.5, 0.5, -0.5, 127.0 / 256, 128.0 / 256};
  for (const int32_t form : {kPolarBytes, kPolarNibbles}) {
    const int high = form == kPolarBytes ? 255 : 15, least = form == kPolarBytes ? -128 : -8;
    std::vector<uint8_t> codes(kOutputs * kInputs);
    for (int64_t at = 0; at < kOutputs * kInputs; ++at) {
      const int64_t output = at / kInputs;  // all of one end, all of the other, or both
      codes[at] = static_cast<uint8_t>(output == 0 ? 0 : output == 1 ? high : random.below(2) * high);
    }
    const auto code = [&](int64_t n, int64_t k) { return codes[n * kInputs + k]; };
    const Halves bias(kOutputs), one(kOutputs, half(1));
    Halves pairs(kOutputs * kInputs / kGroup * 2);
    for (size_t at = 0; at < pairs.size(); at += 2) pairs[at] = half(1);
    const Matrix matrix = form == kPolarBytes ? bytes(code, kOutputs, kInputs, one, bias)
                                              : nibbles(code, kOutputs, kInputs, pairs, bias);
    for (int64_t rows = 1; rows <= kRowsOfAll; ++rows) {
      Halves x(rows * kInputs);
      for (int64_t at = 0; at < rows * kInputs; ++at) {
        const int64_t row = at / kInputs;
        const double own = row < 6 ? ends[row] : ends[4 + random.below(4)];
        x[at] = half(at % kGroup ? own : 127);  // the largest of its group
      }
      std::vector<float> got(rows * kOutputs);
      const PolarMatrix view = matrix.view();
      group.done(polar_product(&view, x.data(), nullptr, got.data(), rows, 0, {1, 1}));
      for (int64_t at = 0; at < rows * kOutputs; ++at) {
        const double expected = dot(read(x.data() + at / kOutputs * kInputs, matrix), matrix, at % kOutputs);
        group.single(got[at], expected, expected == static_cast<float>(expected) ? 1e-30 : 1);
        group.same(expected == static_cast<float>(expected) && least < 0);
      }
    }
  }
}

// Every format of a file: products, also of a matrix whose last outputs are stored in another one, and look-up.
void check_blocks(const Format& format, const Format& other) {
  Group group(format.name);
  Random random(20 + format.form);
  for (const int64_t rows : {1, 2, 3, 4, 5, 8, 9, 17, 70}) {
    for (const auto& [outputs, blocks] : {std::pair<int64_t, int64_t>{1, 1}, {16, 2}, {33, 3}}) {
      const int64_t inputs = blocks * format.inputs;
      Matrix matrix = of_file(format, outputs, inputs, random, 1);
      for (matrix.fine = 0; matrix.fine < 2; ++matrix.fine) {
        check_product(group, matrix, rows, 0, {static_cast<int32_t>(1 + random.below(3)), 1}, random);
      }
      const PolarMatrix view = matrix.view();
      for (const int64_t output : {int64_t{0}, outputs - 1, outputs, int64_t{-1}}) {
        Halves row(inputs);
        const int32_t found = polar_look_up(&view, &output, 1, row.data(), {1, 1});
        group.same(found == (output >= 0 && output < outputs ? kPolarDone : kPolarNoSuchPlace));
        for (int64_t k = 0; found == kPolarDone && k < inputs; ++k) {
          group.rounded(row[k], matrix.of(output, k), 2 * std::abs(matrix.of(output, k)) + 0x1p-4);
        }
      }
    }
  }
  constexpr int64_t kInputs = 256, kRows = 3;
  const Matrix first = of_file(format, 48, kInputs, random, 1), last = of_file(other, 20, kInputs, random, 1);
  const PolarMatrix tail = last.view();
  PolarMatrix both = first.view();
  both.next = &tail;
  both.outputs += last.outputs;
  const Halves x = uneven(kRows, kInputs, random);
  std::vector<float> whole(kRows * 68), part(kRows * 48);
  const PolarMatrix alone = first.view();
  group.done(polar_product(&both, x.data(), nullptr, whole.data(), kRows, 0, {2, 1}));
  group.done(polar_product(&alone, x.data(), nullptr, part.data(), kRows, 0, {2, 1}));
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t n = 0; n < 68; ++n) {
      if (n < 48) group.same(whole[row * 68 + n] == part[row * 48 + n]);
      if (n < 48) continue;
      const Doubles own = read(x.data() + row * kInputs, last);
      group.single(whole[row * 68 + n], dot(own, last, n - 48), size_of(own, last, n - 48, false) * 0x1p-18);
    }
  }
  // A scale that is not finite is found.
  std::vector<uint8_t> block(kInputs / format.inputs * format.bytes);
  std::vector<uint8_t> panels(polar_packed_size(format.form, kInputs, 1));
  const auto result = [&](int64_t outputs) {
    return polar_pack(format.form, OpenFile(block).number(), 0, nullptr, kInputs, outputs, panels.data(), {1, 1});
  };
  group.done(result(1));
  group.same(result(2) == kPolarCutShort);
  block[format.halves.back() + 1] = 0x7c;
  group.same(result(1) == kPolarNotFinite);
  group.same(polar_packed_size(format.form, format.inputs - 1, 1) == 0);
}

void check_look_up() {
  Group group("look-up");
  Random random(4);
  const int64_t outputs = 70, inputs = 46, wanted[] = {0, 69, 31, 32, 33};
  const Halves weight = random.halves(outputs * inputs);
  const Matrix matrix = numbers(weight, outputs, inputs, Halves(outputs));
  PolarMatrix rows = matrix.view();
  rows.form = kPolarRows;
  rows.panels = weight.data();
  for (const PolarMatrix& view : {matrix.view(), rows}) {
    Halves found(5 * inputs);
    group.done(polar_look_up(&view, wanted, 5, found.data(), {2, 1}));
    for (int64_t at = 0; at < 5 * inputs; ++at) {
      group.same(found[at] == weight[wanted[at / inputs] * inputs + at % inputs]);
    }
    group.same(polar_look_up(&view, &outputs, 1, found.data(), {1, 1}) == kPolarNoSuchPlace);
  }
}

// -- sampling --------------------------------------------------------------------------------------------------------

void check_sampling() {
  Group group("weights of tokens");
  Random random(5);
  constexpr int64_t kBlock = 512;
  for (const int64_t tokens : {1, 15, 16, 17, 700, 2500}) {
    for (const float temperature : {0.1f, 1.0f, 7.0f}) {
      std::vector<float> logits(tokens);
      for (auto& each : logits) each = static_cast<float>(5 * random.normal());
      for (int64_t at = 3; at < tokens; at += 5) logits[at] = -INFINITY;
      const float highest = *std::max_element(logits.begin(), logits.end());
      std::vector<float> weights(tokens), picked(tokens + kOutputs);
      std::vector<int32_t> found(tokens + kOutputs);
      Doubles sums((tokens + kBlock - 1) / kBlock);
      double total = 0, all = 0;
      int64_t count = 0, next = 0;
      group.done(polar_weigh(logits.data(), tokens, temperature, kBlock, weights.data(), sums.data()));
      group.done(polar_pick(logits.data(), tokens, temperature, kBlock, 1e-3f, picked.data(), found.data(), &count, &total));
      for (int64_t at = 0; at < tokens; ++at) {
        const double expected = std::exp((static_cast<double>(logits[at]) - highest) / temperature);
        group.single(weights[at], expected, 3e-5 * expected + 1e-37);
        if (weights[at] >= 1e-3f) {
          group.same(next < count && picked[next] == weights[at] && found[next] == at);
          ++next;
        }
      }
      for (const double each : sums) all += each;
      group.same(next == count);
      group.compare(total, all, 1e-12 * all);
    }
  }
}

// -- attention -------------------------------------------------------------------------------------------------------

// Weights of the keys from 0 to `position` for one query, in float64.
Doubles attention(const Half* query, const std::function<const Half*(int64_t)>& key, int64_t position, int64_t size,
                  const PolarKind& kind) {
  Doubles scores(position + 1);
  double highest = -INFINITY, sum = 0;
  const int64_t first = kind.window ? std::max<int64_t>(position + 1 - kind.window, 0) : 0;
  for (int64_t k = first; k <= position; ++k) {
    double score = 0;
    for (int64_t d = 0; d < size; ++d) score += wide(query[d]) * wide(key(k)[d]);
    score *= kind.scale;
    scores[k] = kind.softcap > 0 ? kind.softcap * std::tanh(score / kind.softcap) : score;
    highest = std::max(highest, scores[k]);
  }
  for (int64_t k = 0; k <= position; ++k) sum += scores[k] = k < first ? 0 : std::exp(scores[k] - highest);
  for (auto& each : scores) each /= sum;
  return scores;
}

constexpr PolarKind kKinds[] = {{0.125, 0, 0}, {0.3, 2, 0}, {0.125, 0, 5}, {0.3, 30, 64}, {0.2, 0, 1}};

// A store whose unwritten places are no numbers.
struct Store {
  int64_t places, groups, page, size;
  Halves numbers;
  Store(int64_t places, int64_t groups, int64_t page, int64_t size)
      : places(places), groups(groups), page(page), size(size), numbers(places * 2 * groups * page * size, 0x7fc0) {}
  const Half* at(int64_t place, int64_t which, int64_t group, int64_t offset) const {
    return numbers.data() + (((place * 2 + which) * groups + group) * page + offset) * size;
  }
};

void check_pages() {
  Group group("attention over pages");
  Random random(6);
  constexpr int64_t kPage = 64, kBlocks = 3;
  for (const int64_t size : {32, 64, 96, 128}) {
    for (const PolarKind& kind : kKinds) {
      const int64_t groups = 1 + random.below(2), sharing = 1 + random.below(6), heads = groups * sharing;
      const std::vector<int64_t> positions = {0, 14, 15, 16, 63, 64, 150, 191};
      const auto rows = static_cast<int64_t>(positions.size());
      Store store(rows * kBlocks + 1, groups, kPage, size);
      std::vector<int64_t> table(rows * kBlocks);
      for (int64_t at = 0; at < rows * kBlocks; ++at) table[at] = rows * kBlocks - at;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t tokens = positions[row] + 1;
        const Halves keys = random.halves(tokens * groups * size), values = random.halves(tokens * groups * size);
        std::vector<int64_t> pages(tokens), offsets(tokens);
        for (int64_t t = 0; t < tokens; ++t) {
          pages[t] = table[row * kBlocks + t / kPage];
          offsets[t] = t % kPage;
        }
        group.done(polar_write_pages(store.numbers.data(), store.places, groups, kPage, size, pages.data(),
                                     offsets.data(), tokens, keys.data(), {groups * size, size}, values.data(),
                                     {groups * size, size}));
      }
      const int64_t step = (heads + 2) * size;  // of a larger tensor
      const Halves query = random.halves(rows * step);
      Halves mixed(rows * heads * size);
      group.done(polar_attend_pages(query.data(), step, store.numbers.data(), table.data(), positions.data(),
                                    mixed.data(), rows, heads, groups, size, kPage, kBlocks, kind, {2, 1}));
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t head = 0; head < heads; ++head) {
          const auto place = [&](int64_t k, int64_t which) {
            return store.at(table[row * kBlocks + k / kPage], which, head / sharing, k % kPage);
          };
          const auto key = [&](int64_t k) { return place(k, 0); };
          const Doubles weights = attention(query.data() + row * step + head * size, key, positions[row], size, kind);
          for (int64_t d = 0; d < size; ++d) {
            double expected = 0;
            for (int64_t k = 0; k <= positions[row]; ++k) expected += weights[k] * wide(place(k, 1)[d]);
            group.rounded(mixed[(row * heads + head) * size + d], expected, 4);
          }
        }
      }
    }
  }
  Half one[64] = {};
  const int64_t page = 2, offset = 0;
  Store store(2, 1, 1, 64);
  group.same(polar_write_pages(store.numbers.data(), 2, 1, 1, 64, &page, &offset, 1, one, {64, 64}, one, {64, 64}) ==
             kPolarNoSuchPlace);
}

void check_prompt() {
  Group group("attention of a prompt");
  Random random(7);
  for (const int64_t size : {32, 64, 96, 128}) {
    for (const PolarKind& kind : kKinds) {
      for (const int32_t pairs : {0, 1}) {
        const int64_t groups = 1 + random.below(2), sharing = 1 + random.below(3), heads = groups * sharing;
        const int64_t tokens = 1 + random.below(100), total = tokens + random.below(2) * random.below(90);
        const int64_t step = (heads + 2) * size;
        const Halves query = random.halves(tokens * step), keys = random.halves(total * groups * size);
        const Halves values = random.halves(total * groups * size);
        std::vector<int64_t> positions(tokens);
        for (int64_t t = 0; t < tokens; ++t) positions[t] = total - tokens + t;
        Halves mixed(tokens * heads * size), again(mixed.size());
        // Keys by token, values by head.
        const auto attend = [&](const int64_t* at, Halves& to) {
          group.done(polar_attend_prompt(query.data(), step, keys.data(), {groups * size, size}, values.data(),
                                         {size, total * size}, at, to.data(), tokens, heads, groups, size, total, kind,
                                         pairs, 2));
        };
        attend(nullptr, mixed);
        attend(positions.data(), again);
        group.same(mixed == again);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t head = 0; head < heads; ++head) {
            const int64_t own = head / sharing;
            const auto key = [&](int64_t k) { return keys.data() + (k * groups + own) * size; };
            const Doubles weights = attention(query.data() + t * step + head * size, key, positions[t], size, kind);
            for (int64_t d = 0; d < size; ++d) {
              double expected = 0, large = 0;
              for (int64_t k = 0; k <= positions[t]; ++k) {
                const double value = wide(values[(own * total + k) * size + d]);
                expected += weights[k] * value;
                large += weights[k] * std::abs(value);
              }
              // Weights may be rounded to bfloat16, and so may their sum.
              group.rounded(mixed[(t * heads + head) * size + d], expected, 4 + large * 0x1p10);
            }
          }
        }
      }
    }
  }
}

// -- layers ----------------------------------------------------------------------------------------------------------

Matrix diagonal(int64_t size, double by, int64_t copies = 1) {
  Halves weight(copies * size * size);
  for (int64_t at = 0; at < copies * size; ++at) weight[at * size + at % size] = half(by);
  return numbers(weight, copies * size, size, Halves(copies * size));
}

// A row normed, and rounded where the result is.
Doubles normed(int32_t kind, const Half* weight, const Half* bias, double eps, const Doubles& x) {
  double mean = 0, squares = 0;
  if (kind == kPolarLayerNorm) {
    for (const double each : x) mean += each / static_cast<double>(x.size());
  }
  for (const double each : x) squares += (each - mean) * (each - mean) / static_cast<double>(x.size());
  Doubles y(x.size());
  for (size_t at = 0; at < x.size(); ++at) {
    const double factor = (weight ? wide(weight[at]) : 1) + (kind == kPolarOffsetRms ? 1 : 0);
    y[at] = (x[at] - mean) / std::sqrt(squares + eps) * factor + (bias ? wide(bias[at]) : 0);
  }
  return y;
}

double activated(int32_t kind, double x) {
  switch (kind) {
    case kPolarSilu:
      return x / (1 + std::exp(-x));
    case kPolarRelu:
      return std::max(x, 0.0);
    case kPolarGelu:
      return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    default:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
}

// x cos + (−x₂, x₁) sin of the first `width` numbers of a head.
void turned(Doubles& head, const Half* cos, const Half* sin, int64_t width) {
  const Doubles x = head;
  for (int64_t at = 0; at < width; ++at) {
    const int64_t other = (at + width / 2) % width;
    head[at] = x[at] * wide(cos[at]) + (at < width / 2 ? -1 : 1) * x[other] * wide(sin[at]);
  }
}

Doubles rounded(Doubles numbers) {
  for (auto& each : numbers) each = wide(half(each));
  return numbers;
}

// Norms and positions, by a product that changes nothing.
void check_norms() {
  Group group("norms and positions");
  Random random(8);
  for (const int32_t kind : {kPolarRms, kPolarOffsetRms, kPolarLayerNorm}) {
    for (const int64_t size : {40, 64}) {
      for (const int64_t tokens : {1, 13}) {  // alone, and shared by threads
        for (const bool heads : {false, true}) {
          const Halves weight = random.halves(size, 0.3, 1), bias = random.halves(size), own = random.halves(2 * size, 0.3, 1);
          const Halves x = random.halves(tokens * size, 3, 0.7);
          const int64_t width = size / 2;  // turned in part
          const Halves cos = random.halves(tokens * width), sin = random.halves(tokens * width);
          const Matrix same = diagonal(size, 1, 3);  // one head of queries, keys and values
          PolarLayer layer{};
          layer.qkv = layer.keys_values = same.view();
          layer.attn_norm = {weight.data(), kind == kPolarLayerNorm ? bias.data() : nullptr};
          layer.head_norms = heads ? own.data() : nullptr;
          layer.width = size;
          layer.heads = layer.groups = 1;
          layer.size = size;
          layer.eps = 1e-3f;
          layer.norm = kind;
          Halves qkv(tokens * 3 * size), kv(tokens * 2 * size);
          const PolarAngles angles{cos.data(), sin.data(), heads ? width : 0};
          group.done(polar_project(&layer, x.data(), tokens, angles, qkv.data(), {2, 1}));
          group.done(polar_keys_values(&layer, x.data(), tokens, angles, kv.data(), {2, 1}));
          for (int64_t token = 0; token < tokens; ++token) {
            Doubles states(size);
            for (int64_t at = 0; at < size; ++at) states[at] = wide(x[token * size + at]);
            const Doubles all = normed(kind, weight.data(), kind == kPolarLayerNorm ? bias.data() : nullptr, 1e-3, states);
            for (int64_t part = 0; part < 3; ++part) {
              Doubles expected = all;
              if (heads && part < 2) {
                expected = rounded(normed(kind, own.data() + part * size, nullptr, 1e-3, rounded(expected)));
                turned(expected, cos.data() + token * width, sin.data() + token * width, width);
              }
              for (int64_t at = 0; at < size; ++at) {
                // What is rounded in between may be rounded to either side.
                const double error = heads && part < 2 ? 0x1p11 * (1 + std::abs(all[at])) : 4;
                const Half got = qkv[(token * 3 + part) * size + at];
                group.rounded(got, expected[at], error);
                if (part) group.same(got == kv[(token * 2 + part - 1) * size + at]);
              }
            }
          }
        }
      }
    }
  }
}

// Activations of numbers that come out of a norm as its weights, since the states before it are ±2⁻⁴⁰.
void check_activations() {
  Group group("activations");
  Random random(10);
  constexpr int64_t kWidth = 96, kTokens = 9;
  const Matrix nothing = diagonal(kWidth, 0), same = diagonal(kWidth, 1), twice = diagonal(kWidth, 1, 2);
  for (const int32_t activation : {kPolarSilu, kPolarRelu, kPolarGelu, kPolarGeluTanh}) {
    for (const bool gated : {false, true}) {
      for (const double by : {0.01, 1.0, 30.0}) {
        const Halves weight = random.halves(kWidth, by), mixed(kTokens * kWidth);
        Halves x(kTokens * kWidth), y(x.size());
        for (auto& each : x) each = half(random.below(2) ? 0x1p-40 : -0x1p-40);
        PolarLayer layer{};
        layer.out = nothing.view();
        layer.up = gated ? twice.view() : same.view();
        layer.down = same.view();
        layer.mlp_norm = {weight.data(), nullptr};
        layer.width = layer.size = kWidth;
        layer.heads = layer.groups = 1;
        layer.activation = activation;
        layer.gated = gated;
        group.done(polar_finish(&layer, x.data(), mixed.data(), y.data(), kTokens, {2, 1}));
        for (int64_t at = 0; at < kTokens * kWidth; ++at) {
          const double own = wide(weight[at % kWidth]) * (wide(x[at]) > 0 ? 1 : -1);
          const double expected = activated(activation, own) * (gated ? own : 1);
          group.rounded(y[at], expected, 0.25 * std::abs(own) * (gated ? std::abs(own) : 1) + 0x1p-20);
        }
      }
    }
  }
}

// A layer of random weights, and the same in float64 with bfloat16 where the library rounds.
struct Layer {
  PolarLayer it{};
  Matrix qkv, keys_values, out, up, down;
  Halves norms[4], biases[4], own;

  Layer(int32_t form, int32_t norm, int32_t activation, bool gated, bool parallel, bool after, bool heads,
        const PolarKind& kind, Random& random) {
    constexpr int64_t kWidth = 64, kHeads = 4, kGroups = 2, kSize = 32, kUnits = 96;
    const double by = 0.125;
    qkv = drawn(form, (kHeads + 2 * kGroups) * kSize, kWidth, random, by);
    out = drawn(form, kWidth, kHeads * kSize, random, by);
    up = drawn(form, (gated ? 2 : 1) * kUnits, kWidth, random, by);
    down = drawn(form, kWidth, kUnits, random, by);
    for (int i = 0; i < 4; ++i) {
      norms[i] = random.halves(kWidth, 0.2, norm == kPolarOffsetRms ? 0 : 1);
      if (norm == kPolarLayerNorm) biases[i] = random.halves(kWidth, 0.2);
    }
    own = random.halves((kHeads + kGroups) * kSize, 0.2, 1);
    it.qkv = it.keys_values = qkv.view();
    it.out = out.view();
    it.up = up.view();
    it.down = down.view();
    PolarNorm* const places[] = {&it.attn_norm, &it.mlp_norm, &it.attn_after, &it.mlp_after};
    for (int i = 0; i < (after ? 4 : 2); ++i) {
      *places[i] = {norms[i].data(), biases[i].empty() ? nullptr : biases[i].data()};
    }
    it.head_norms = heads ? own.data() : nullptr;
    it.kind = kind;
    it.width = kWidth;
    it.heads = kHeads;
    it.groups = kGroups;
    it.size = kSize;
    it.eps = 1e-5f;
    it.norm = norm;
    it.activation = activation;
    it.gated = gated;
    it.parallel = parallel;
  }

  Doubles norm(const PolarNorm& of, const Doubles& x) const {
    return normed(it.norm, static_cast<const Half*>(of.weight), static_cast<const Half*>(of.bias), it.eps, x);
  }
  // Of a row that is rounded to bfloat16.
  static Doubles times(const Matrix& matrix, const Doubles& x) {
    Halves row;
    for (const double each : x) row.push_back(half(each));
    const Doubles own = read(row.data(), matrix);
    Doubles y(matrix.outputs);
    for (int64_t n = 0; n < matrix.outputs; ++n) y[n] = dot(own, matrix, n);
    return y;
  }

  // One token, whose keys and values join those before it.
  Doubles decode(const Doubles& x, const Half* cos, const Half* sin, int64_t angles, std::vector<Halves>& keys,
                 std::vector<Halves>& values) const {
    const int64_t size = it.size, sharing = it.heads / it.groups;
    const Doubles all = rounded(times(qkv, norm(it.attn_norm, x)));
    std::vector<Halves> heads;
    for (int64_t head = 0; head < it.heads + 2 * it.groups; ++head) {
      Doubles one(all.begin() + head * size, all.begin() + (head + 1) * size);
      if (head < it.heads + it.groups) {
        if (it.head_norms) one = rounded(normed(it.norm, own.data() + head * size, nullptr, it.eps, one));
        turned(one, cos, sin, angles);
      }
      heads.emplace_back();
      for (const double each : one) heads.back().push_back(half(each));
    }
    Halves key, value;
    for (int64_t group = 0; group < it.groups; ++group) {
      const Halves &k = heads[it.heads + group], &v = heads[it.heads + it.groups + group];
      key.insert(key.end(), k.begin(), k.end());
      value.insert(value.end(), v.begin(), v.end());
    }
    keys.push_back(key);
    values.push_back(value);
    Doubles mixed(it.heads * size);
    for (int64_t head = 0; head < it.heads; ++head) {
      const auto at = [&](int64_t k) { return keys[k].data() + head / sharing * size; };
      const Doubles weights = attention(heads[head].data(), at, static_cast<int64_t>(keys.size()) - 1, size, it.kind);
      for (size_t k = 0; k < keys.size(); ++k) {
        for (int64_t d = 0; d < size; ++d) mixed[head * size + d] += weights[k] * wide(values[k][head / sharing * size + d]);
      }
    }
    Doubles attended = times(out, mixed);
    if (it.attn_after.weight) attended = norm(it.attn_after, attended);
    Doubles between = x;
    for (int64_t at = 0; at < it.width; ++at) between[at] += attended[at];
    const Doubles inner = rounded(times(up, norm(it.mlp_norm, it.parallel ? x : between)));
    Doubles active(down.inputs);
    for (int64_t at = 0; at < down.inputs; ++at) {
      active[at] = activated(it.activation, inner[at]) * (it.gated ? inner[down.inputs + at] : 1);
    }
    Doubles grown = times(down, active);
    if (it.mlp_after.weight) grown = norm(it.mlp_after, grown);
    for (int64_t at = 0; at < it.width; ++at) grown[at] += between[at];
    return rounded(grown);
  }
};

// Tokens of some rows through two layers, one of them twice.
void check_layers() {
  Group group("layers that decode");
  Random random(11);
  constexpr int64_t kRows = 3, kBefore = 14, kSteps = 4, kPage = 16, kBlocks = 2, kVisits = 3, kAngles = 32, kWidth = 64;
  const int64_t visits[kVisits] = {0, 1, 0};
  const int32_t forms[] = {kPolarNumbers, kPolarBytes, kPolarNibbles, kPolarQ4_0, kPolarQ4_1, kPolarQ5_0, kPolarQ5_1,
                           kPolarQ8_0};
  for (int variant = 0; variant < 24; ++variant) {
    const int32_t form = forms[variant % 8], norm = variant / 3 % 3, activation = variant % 4;
    const bool gated = variant % 2, parallel = variant % 5 == 4, after = variant % 7 == 6, heads = variant % 3 == 1;
    const PolarKind kind = kKinds[variant % 5];
    const Layer layers[] = {Layer(form, norm, activation, gated, parallel, after, heads, kind, random),
                            Layer(form, norm, activation, gated, parallel, after, heads, kind, random)};
    const PolarLayer views[] = {layers[0].it, layers[1].it};
    // Each row has pages of its own for each visit; a token of row 1 does not run the last one.
    Store store(kRows * kVisits * kBlocks, layers[0].it.groups, kPage, layers[0].it.size);
    std::vector<Halves> keys[kRows][kVisits], values[kRows][kVisits];
    const int64_t heads_width = store.groups * store.size;
    for (int64_t row = 0; row < kRows * kVisits; ++row) {
      for (int64_t at = 0; at < kBefore; ++at) {
        const Halves key = random.halves(heads_width), value = random.halves(heads_width);
        const int64_t page = row * kBlocks;
        group.done(polar_write_pages(store.numbers.data(), store.places, store.groups, kPage, store.size, &page, &at, 1,
                                     key.data(), {0, store.size}, value.data(), {0, store.size}));
        keys[row / kVisits][row % kVisits].push_back(key);
        values[row / kVisits][row % kVisits].push_back(value);
      }
    }
    for (int64_t step = kBefore; step < kBefore + kSteps; ++step) {
      Halves x = random.halves(kRows * kWidth);
      const Halves cos = random.halves(kRows * kAngles, 0.7), sin = random.halves(kRows * kAngles, 0.7);
      std::vector<int64_t> bounds = {0}, index, table, positions;
      std::vector<Doubles> expected(kRows);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t at = 0; at < kWidth; ++at) expected[row].push_back(wide(x[row * kWidth + at]));
      }
      for (int64_t visit = 0; visit < kVisits; ++visit) {
        for (int64_t row = 0; row < kRows; ++row) {
          if (row == 1 && visit == 2) continue;
          index.push_back(row);
          positions.push_back(step);
          for (int64_t block = 0; block < kBlocks; ++block) table.push_back((row * kVisits + visit) * kBlocks + block);
          expected[row] = layers[visits[visit]].decode(expected[row], cos.data() + row * kAngles, sin.data() + row * kAngles,
                                                       kAngles, keys[row][visit], values[row][visit]);
        }
        bounds.push_back(static_cast<int64_t>(index.size()));
      }
      int64_t done = 0;
      const PolarAngles angles{cos.data(), sin.data(), kAngles};
      group.done(polar_decode_layers(views, 2, x.data(), visits, kVisits, bounds.data(), index.data(), table.data(),
                                     positions.data(), &angles, {store.numbers.data(), store.places, kPage, kBlocks},
                                     &done, {2, 1}));
      group.same(done == kVisits);
      for (int64_t row = 0; row < kRows; ++row) {
        double square = 0;
        for (const double each : expected[row]) square += each * each / kWidth;
        for (int64_t at = 0; at < kWidth; ++at) {
          // Five times in a layer what is rounded may go to either side, by 2⁻⁸ of numbers of this size.
          const Half got = x[row * kWidth + at];
          group.digest(got);
          group.compare(wide(got), expected[row][at], 0x1p-4 * (std::abs(expected[row][at]) + std::sqrt(square)));
        }
      }
    }
  }
}

// -- guesses ---------------------------------------------------------------------------------------------------------

void check_guesses() {
  Group group("guesses of a draft head");
  Random random(12);
  constexpr int64_t kWidth = 64, kUnits = 96, kTokens = 50, kRows = 3, kMost = 4;
  const Matrix enter = drawn(kPolarBytes, kWidth, 2 * kWidth, random, 0.1);
  const Matrix gated = drawn(kPolarBytes, 2 * kUnits, kWidth, random, 0.1);
  const Matrix down = drawn(kPolarBytes, kWidth, kUnits, random, 0.1);
  const Matrix rows = drawn(kPolarBytes, kTokens + 1, kWidth, random, 0.5);
  std::vector<int64_t> numbers(kTokens);
  for (int64_t at = 0; at < kTokens; ++at) numbers[at] = 3 * at;
  const Halves scale = random.halves(kWidth, 0.2, 1), embeddings = random.halves(3 * kTokens * kWidth);
  const PolarMatrix embedded{embeddings.data(), nullptr, nullptr, kWidth, 3 * kTokens, nullptr, kPolarRows, 0};
  const PolarDraftHead head{kWidth, kUnits, kTokens, numbers.data(), scale.data(), enter.view(), gated.view(),
                            down.view(), rows.view(), embedded};
  for (int64_t round = 0; round < 20; ++round) {
    const Halves states = random.halves(kRows * kWidth);
    const int64_t tokens[kRows] = {random.below(150), random.below(150), random.below(150)};
    int64_t guesses[kRows * kMost] = {}, made = 0;
    float chances[kRows * kMost] = {};
    group.done(polar_guess(&head, states.data(), tokens, kRows, kMost, 0, guesses, chances, &made, {2, 1}));
    group.same(made == kMost);
    for (int64_t at = 0; at < kRows * kMost; ++at) {
      group.digest(guesses[at]);
      group.same(guesses[at] % 3 == 0 && guesses[at] < 3 * kTokens && chances[at] > 0 && chances[at] <= 1);
    }
  }
}

}  // namespace

int main() {
  check_products(kPolarNumbers, "products of numbers");
  check_products(kPolarBytes, "products of bytes");
  check_products(kPolarNibbles, "products of half bytes");
  for (size_t at = 0; at < kFormats.size(); ++at) check_blocks(kFormats[at], kFormats[(at + 3) % kFormats.size()]);
  check_exactness();
  check_look_up();
  check_sampling();
  check_pages();
  check_prompt();
  check_norms();
  check_activations();
  check_layers();
  check_guesses();
  return Group::failed ? 1 : 0;
}
