// SPDX-License-Identifier: Apache-2.0
//
// The GPU kernels that this library was built with: for which GPUs there is machine code, for the others PTX, and that
// both are of CUDA 12.9, so that drivers from R535 on load them; or why there are none.
#include <elf.h>
#include <string.h>

#include <set>
#include <string>

#include "check.h"
#include "cuda/image.h"

using namespace ept::cuda;

namespace {

void built() {
  for (const std::string name : {"moe", "litmus"}) {
    check::running(name.c_str());
    std::set<int> code, ptx;
    for (const Image *image = images; image->name; image++) {
      if (image->name != name) continue;
      (image->ptx ? ptx : code).insert(image->arch);
      if (image->ptx) {
        const std::string text(reinterpret_cast<const char *>(image->data), image->size);
        CHECK_HAS(text.c_str(), (".target sm_" + std::to_string(image->arch)).c_str());
        CHECK_HAS(text.c_str(), ".version 8.8");  // PTX of CUDA 12.9
        continue;
      }
      Elf64_Ehdr head;
      CHECK(image->size > sizeof head);
      memcpy(&head, image->data, sizeof head);
      CHECK_EQ(memcmp(head.e_ident, ELFMAG, SELFMAG), 0);
      CHECK_EQ(head.e_machine, EM_CUDA);
    }
    CHECK(code == std::set<int>({80, 90, 100}));
    CHECK(ptx == std::set<int>({90}));
  }
  ept_error error{};
  error.size = sizeof error;
  const auto chosen = [&](int capability) { return image_for("moe", capability, &error); };
  CHECK_EQ(chosen(80)->arch, 80);
  CHECK_EQ(chosen(89)->arch, 80);  // Ada runs Ampere's
  CHECK_EQ(chosen(90)->arch, 90);
  CHECK(!chosen(90)->ptx);
  CHECK_EQ(chosen(103)->arch, 100);
  CHECK(chosen(120)->ptx);
  CHECK(!chosen(75));
  CHECK_HAS(error.text, "it takes 8.0");
  CHECK(!image_for("none", 90, &error));
}

// What is compiled at run time is taken for the GPUs that it is for, and for no other.
void added() {
  check::running("images that are added");
  static const char bytes[] = "machine code";
  CHECK(!image_for("moe", 121, nullptr) || image_for("moe", 121, nullptr)->ptx);
  add_image("moe", 121, bytes, sizeof bytes);
  const Image *const got = image_for("moe", 121, nullptr);
  CHECK(got && !got->ptx && got->arch == 121 && got->size == sizeof bytes);
  CHECK_EQ(memcmp(got->data, bytes, sizeof bytes), 0);
  CHECK(got->data != reinterpret_cast<const unsigned char *>(bytes));
  const Image *const other = image_for("moe", 90, nullptr);
  CHECK(!other || other->arch == 90);
}

}  // namespace

int main() {
  if (no_images) {
    CHECK_HAS(no_images, "built without GPU kernels");
    CHECK_HAS(no_images, "pip install nvidia-cuda-nvrtc-cu12==12.9.86");
    ept_error error{};
    error.size = sizeof error;
    CHECK(!image_for("moe", 90, &error));
    CHECK_EQ(error.code, EPT_E_UNAVAILABLE);
    CHECK_HAS(error.text, "pip install nvidia-cuda-nvrtc-cu12==12.9.86");
  } else {
    built();
  }
  added();
  return 0;
}
