//! Compiling for TPUs on a machine that has none.
//!
//! libtpu is large, so `make test` does without: these run if `BATON_PJRT_TPU` names it, in a process started with
//! `TPU_SKIP_MDS_QUERY=1`.

use baton_pjrt::{CompileOptions, Error, Plugin, Topology};

/// `c = a · b`, split over eight devices along the dimension that is summed over.
const DOT: &str =
    "module @dot attributes {mhlo.num_partitions = 8 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <[\"tp\"=8]>
  func.func public @main(
      %a: tensor<256x4096xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{}, {\"tp\"}]>},
      %b: tensor<4096x512xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{\"tp\"}, {}]>})
      -> (tensor<256x512xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}) {
    %c = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0]
      : (tensor<256x4096xbf16>, tensor<4096x512xbf16>) -> tensor<256x512xbf16>
    return %c : tensor<256x512xbf16>
  }
}";

#[test]
#[ignore = "needs BATON_PJRT_TPU and TPU_SKIP_MDS_QUERY=1"]
fn a_program_is_compiled_for_eight_absent_chips() {
    let path = std::env::var_os("BATON_PJRT_TPU").expect("BATON_PJRT_TPU must name libtpu.so");
    let plugin = Plugin::load(path).unwrap();
    let error = Topology::create(&plugin, "v6e:no", &[]).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Call {
                call: "PJRT_TopologyDescription_Create",
                ..
            }
        ),
        "{error}"
    );
    let topology = Topology::create(&plugin, "v6e:2x4", &[]).unwrap();
    assert_eq!(topology.platform_name().unwrap(), "tpu");
    topology.platform_version().unwrap();
    topology.attributes().unwrap();
    let devices = topology.devices().unwrap();
    assert_eq!(devices.len(), 8);
    assert_eq!(devices[0].kind().unwrap(), "TPU v6 lite");
    assert!(
        devices[0]
            .attributes()
            .unwrap()
            .iter()
            .any(|(name, _)| name == "coords")
    );

    let program = topology.compile(DOT, &CompileOptions::sharded(8)).unwrap();
    assert_eq!(program.n_partitions().unwrap(), 8);
    let memory = program.memory().unwrap();
    assert_eq!(memory.arguments, (256 * 512 + 512 * 512) * 2);
    assert!(
        memory.results >= 256 * 512 * 2 && memory.code > 0,
        "{memory:?}"
    );
    let cost = program.cost().unwrap();
    assert!(
        cost.flops
            .is_some_and(|flops| flops >= 2.0 * 256.0 * 512.0 * 512.0),
        "{cost:?}"
    );
    assert!(cost.bytes_accessed.is_some(), "{cost:?}");
    assert!(!program.serialize().unwrap().is_empty());
    let error = topology
        .compile("no program", &CompileOptions::default())
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            Error::Call {
                call: "PJRT_Compile",
                ..
            }
        ),
        "{error}"
    );
}
