//! The binding against XLA's CPU plugin.

use baton_pjrt::{Arg, Client, CompileOptions, Plugin};

fn plugin() -> Plugin {
    let path = std::env::var_os("BATON_PJRT_CPU").expect(
        "BATON_PJRT_CPU must name the CPU plugin's shared library; `baton fetch` brings it, `make test` sets it",
    );
    Plugin::load(path).expect("the CPU plugin loads")
}

fn client(devices: i64) -> Client {
    Client::create(&plugin(), &[("cpu_device_count", devices.into())])
        .expect("CPUs are always there")
}

const ADD: &str = "module @add {
  func.func public @main(%a: tensor<4xf32>, %b: tensor<4xf32>) -> tensor<4xf32> {
    %c = stablehlo.add %a, %b : tensor<4xf32>
    return %c : tensor<4xf32>
  }
}";

#[test]
fn two_vectors_are_added() {
    let client = client(1);
    let device = &client.addressable_devices().unwrap()[0];
    let add = client.compile(ADD, &CompileOptions::default()).unwrap();
    let a = client
        .buffer_from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[4], device)
        .unwrap();
    let b = client
        .buffer_from_slice(&[10.0_f32, 20.0, 30.0, 40.0], &[4], device)
        .unwrap();
    for _ in 0..3 {
        let sum = add.execute([Arg::Borrow(&a), Arg::Borrow(&b)]).unwrap();
        assert_eq!(sum[0].to_vec::<f32>().unwrap(), [11.0, 22.0, 33.0, 44.0]);
    }
}

const BUMP: &str = "module @bump {
  func.func public @main(%a: tensor<1024xf32> {tf.aliasing_output = 0 : i32}, %b: tensor<1024xf32>) -> tensor<1024xf32> {
    %c = stablehlo.add %a, %b : tensor<1024xf32>
    return %c : tensor<1024xf32>
  }
}";

#[test]
fn a_donated_argument_gives_its_memory_to_the_result() {
    let client = client(1);
    let device = &client.addressable_devices().unwrap()[0];
    let bump = client.compile(BUMP, &CompileOptions::default()).unwrap();
    let one = client
        .buffer_from_slice(&[1.0_f32; 1024], &[1024], device)
        .unwrap();
    let mut state = client
        .buffer_from_slice(&[0.0_f32; 1024], &[1024], device)
        .unwrap();
    let address = state.address().unwrap();
    for _ in 0..5 {
        state = bump
            .execute([Arg::Donate(state), Arg::Borrow(&one)])
            .unwrap()
            .remove(0);
        assert_eq!(state.address().unwrap(), address);
    }
    assert_eq!(state.to_vec::<f32>().unwrap(), [5.0; 1024]);
}

#[test]
fn a_lent_argument_survives_a_program_that_would_take_it() {
    let client = client(1);
    let device = &client.addressable_devices().unwrap()[0];
    let bump = client.compile(BUMP, &CompileOptions::default()).unwrap();
    let one = client
        .buffer_from_slice(&[1.0_f32; 1024], &[1024], device)
        .unwrap();
    let state = client
        .buffer_from_slice(&[7.0_f32; 1024], &[1024], device)
        .unwrap();
    let bumped = bump
        .execute([Arg::Borrow(&state), Arg::Borrow(&one)])
        .unwrap();
    assert_eq!(bumped[0].to_vec::<f32>().unwrap(), [8.0; 1024]);
    assert_eq!(state.to_vec::<f32>().unwrap(), [7.0; 1024]);
    assert_ne!(bumped[0].address().unwrap(), state.address().unwrap());
}
