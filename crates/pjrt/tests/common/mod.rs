//! What the tests against a plugin share.

use baton_pjrt::{Client, Device, Plugin};

/// The CPU plugin. A test without it fails: a skipped test would look like a passed one.
pub(crate) fn plugin() -> Plugin {
    let path = std::env::var_os("BATON_PJRT_CPU").expect(
        "BATON_PJRT_CPU must name the CPU plugin's shared library; `baton fetch` brings it, `make test` sets it",
    );
    Plugin::load(path).expect("the CPU plugin loads")
}

/// A client with so many devices.
pub(crate) fn client(devices: i64) -> (Client, Vec<Device>) {
    let options = [("cpu_device_count", devices.into())];
    let client = Client::create(&plugin(), &options).expect("CPUs are always there");
    let devices = client
        .addressable_devices()
        .expect("a client lists its devices");
    (client, devices)
}

/// `c = a + b`, four floats each.
pub(crate) const ADD: &str = "module @add {
  func.func public @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
    %c = stablehlo.add %a, %b : tensor<4xf32>
    return %c : tensor<4xf32>
  }
}";

/// `a += b` in place, 256 Ki floats each.
pub(crate) const BUMP: &str = "module @bump {
  func.func public @main(%a: tensor<262144xf32> {tf.aliasing_output = 0 : i32}, %b: tensor<262144xf32>)
      -> tensor<262144xf32> {
    %c = stablehlo.add %a, %b : tensor<262144xf32>
    return %c : tensor<262144xf32>
  }
}";

/// Elements of [`BUMP`]'s arrays.
pub(crate) const BUMP_LEN: usize = 262_144;
