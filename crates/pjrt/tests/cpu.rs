//! The binding against XLA's CPU plugin.

mod common;

use baton_pjrt::{
    Arg, Buffer, Client, Code, CompileOptions, DType, Device, DeviceAssignment, Error, HostMemory,
    Plugin, Sharing, Topology, Value,
};
use common::{ADD, BUMP, BUMP_LEN, client, plugin};
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

fn compile(client: &Client, text: &str) -> baton_pjrt::LoadedExecutable {
    client
        .compile(text, &CompileOptions::default())
        .expect("the program is right")
}

fn four(client: &Client, device: &Device, values: [f32; 4]) -> Buffer {
    client
        .buffer_from_slice(&values, &[4], device)
        .expect("there is memory for four floats")
}

fn bump_array(client: &Client, device: &Device, value: f32) -> Buffer {
    let values = vec![value; BUMP_LEN];
    client
        .buffer_from_slice(&values, &[BUMP_LEN as i64], device)
        .expect("there is memory")
}

fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn a_plugin_says_what_it_is() {
    let plugin = plugin();
    let (major, minor) = plugin.api_version();
    assert!(major == 0 && minor >= 81, "{major}.{minor}");
    assert!(plugin.stablehlo_version().unwrap().unwrap() >= vec![1, 0, 0]);
    assert!(plugin.has_extension(baton_pjrt::Extension::Ffi));
    assert!(!plugin.has_extension(baton_pjrt::Extension::TpuTopology));
    let extensions = plugin.extensions();
    assert!(extensions.iter().all(|kind| plugin.has_extension(*kind)));
}

#[test]
fn a_client_lists_its_devices_and_their_memories() {
    let (client, devices) = client(2);
    assert_eq!(client.platform_name().unwrap(), "cpu");
    assert!(!client.platform_version().unwrap().is_empty());
    assert_eq!(client.devices().unwrap().len(), 2);
    assert_eq!(devices.len(), 2);
    for (id, device) in devices.iter().enumerate() {
        let description = device.description().unwrap();
        assert_eq!(description.id().unwrap(), id as i32);
        assert_eq!(description.process_index().unwrap(), 0);
        assert!(!description.kind().unwrap().is_empty());
        assert!(!description.name().unwrap().is_empty());
        description.attributes().unwrap();
        assert!(device.is_addressable().unwrap());
        device.local_hardware_id().unwrap();
        let default = device.default_memory().unwrap();
        let ids: Vec<i32> = device
            .memories()
            .unwrap()
            .iter()
            .map(|memory| memory.id().unwrap())
            .collect();
        assert!(ids.contains(&default.id().unwrap()));
        assert!(!default.kind().unwrap().is_empty());
    }
}

#[test]
fn memory_stats_are_figures_or_a_typed_refusal() {
    let (_client, devices) = client(1);
    match devices[0].memory_stats() {
        Ok(stats) => assert!(stats.bytes_in_use >= 0),
        Err(error) => assert_eq!(error.code(), Some(Code::Unimplemented)),
    }
}

#[test]
fn two_vectors_are_added() {
    let (client, devices) = client(1);
    let add = compile(&client, ADD);
    let a = four(&client, &devices[0], [1.0, 2.0, 3.0, 4.0]);
    let b = four(&client, &devices[0], [10.0, 20.0, 30.0, 40.0]);
    for _ in 0..3 {
        let sum = add.execute([Arg::Borrow(&a), Arg::Borrow(&b)]).unwrap();
        assert_eq!(sum[0].to_vec::<f32>().unwrap(), [11.0, 22.0, 33.0, 44.0]);
    }
    // The same array may be lent twice.
    let twice = add.execute([Arg::Borrow(&a), Arg::Borrow(&a)]).unwrap();
    assert_eq!(twice[0].to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0, 8.0]);
}

#[test]
fn a_program_may_take_nothing_and_give_several_arrays() {
    let (client, _devices) = client(1);
    let constants = compile(
        &client,
        "func.func public @main() -> (tensor<2xi32>, tensor<f32>) {
           %a = stablehlo.constant dense<[3, 4]> : tensor<2xi32>
           %b = stablehlo.constant dense<0.5> : tensor<f32>
           return %a, %b : tensor<2xi32>, tensor<f32>
         }",
    );
    let outputs = constants.execute([]).unwrap();
    assert_eq!(outputs.len(), 2);
    assert_eq!(outputs[0].to_vec::<i32>().unwrap(), [3, 4]);
    assert_eq!(outputs[1].to_vec::<f32>().unwrap(), [0.5]);
}

#[test]
fn handles_may_be_dropped_in_any_order() {
    let (client, devices) = client(1);
    let add = compile(&client, ADD);
    let a = four(&client, &devices[0], [1.0; 4]);
    let (sum, done) = add
        .execute_tracked([Arg::Borrow(&a), Arg::Borrow(&a)])
        .unwrap();
    drop((client, devices, add, a));
    done.wait().unwrap();
    assert_eq!(sum[0].to_vec::<f32>().unwrap(), [2.0; 4]);
}

#[test]
fn an_array_says_what_it_is() {
    let (client, devices) = client(1);
    let array = client
        .buffer_from_slice(&[7_i32; 6], &[2, 3], &devices[0])
        .unwrap();
    array.ready().unwrap().wait().unwrap();
    assert_eq!(array.dtype().unwrap(), DType::S32);
    assert_eq!(array.dims().unwrap(), [2, 3]);
    assert_eq!(array.host_size().unwrap(), 24);
    assert!(array.on_device_size().unwrap() >= 24);
    assert!(array.device().unwrap() == devices[0]);
    assert_eq!(
        array.memory().unwrap().id().unwrap(),
        devices[0].default_memory().unwrap().id().unwrap()
    );
    array.delete().unwrap();
}

#[test]
fn every_element_type_comes_back_as_it_went() {
    let (client, devices) = client(1);
    use DType::*;
    for dtype in [
        Pred, S8, S16, S32, S64, U8, U16, U32, U64, F16, BF16, F32, F64, F8E4M3FN, F8E5M2,
    ] {
        let bytes: Vec<u8> = (0..6 * dtype.bytes()).map(|i| (i % 2) as u8).collect();
        let array = client
            .buffer_from_bytes(&bytes, dtype, &[2, 3], &devices[0])
            .unwrap();
        assert_eq!(array.dtype().unwrap(), dtype);
        let mut back = vec![0xff; bytes.len()];
        array.copy_to_host(&mut back).unwrap();
        assert_eq!(back, bytes, "{dtype}");
    }
}

#[test]
fn scalars_and_empty_arrays_are_arrays() {
    let (client, devices) = client(1);
    let scalar = client
        .buffer_from_slice(&[42_i64], &[], &devices[0])
        .unwrap();
    assert_eq!(scalar.to_vec::<i64>().unwrap(), [42]);
    let empty = client
        .buffer_from_slice::<f32>(&[], &[0, 4], &devices[0])
        .unwrap();
    assert!(empty.to_vec::<f32>().unwrap().is_empty());
    let owned = HostMemory::zeroed(0);
    client
        .buffer_from_owned(owned, DType::F32, &[0], &devices[0], Sharing::ZeroCopy)
        .unwrap();
}

#[test]
fn results_in_another_layout_reach_the_host_dense() {
    let (client, devices) = client(1);
    let transpose = compile(
        &client,
        "func.func public @main(%a: tensor<2x3xf32>) -> (tensor<3x2xf32> {mhlo.layout_mode = \"{0,1}\"}) {
           %b = stablehlo.transpose %a, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
           return %b : tensor<3x2xf32>
         }",
    );
    let a = client
        .buffer_from_slice(&[1.0_f32, 2., 3., 4., 5., 6.], &[2, 3], &devices[0])
        .unwrap();
    let b = transpose.execute([Arg::Borrow(&a)]).unwrap();
    assert_eq!(b[0].to_vec::<f32>().unwrap(), [1., 4., 2., 5., 3., 6.]);
}

#[test]
fn a_donated_argument_gives_its_memory_to_the_result() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let mut state = bump_array(&client, &devices[0], 0.0);
    let address = state.address().unwrap();
    for _ in 0..5 {
        state = bump
            .execute([Arg::Donate(state), Arg::Borrow(&one)])
            .unwrap()
            .remove(0);
        assert_eq!(state.address().unwrap(), address);
    }
    assert_eq!(state.to_vec::<f32>().unwrap(), [5.0; BUMP_LEN]);
}

#[test]
fn a_lent_argument_survives_a_program_that_would_take_it() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let state = bump_array(&client, &devices[0], 7.0);
    let bumped = bump
        .execute([Arg::Borrow(&state), Arg::Borrow(&one)])
        .unwrap();
    assert_eq!(bumped[0].to_vec::<f32>().unwrap(), [8.0; BUMP_LEN]);
    assert_eq!(state.to_vec::<f32>().unwrap(), [7.0; BUMP_LEN]);
    assert_ne!(bumped[0].address().unwrap(), state.address().unwrap());
}

#[test]
fn an_argument_given_to_a_program_that_does_not_take_it_is_freed() {
    let (client, devices) = client(1);
    let add = compile(&client, ADD);
    let a = four(&client, &devices[0], [1.0; 4]);
    let b = four(&client, &devices[0], [2.0; 4]);
    let sum = add.execute([Arg::Donate(a), Arg::Donate(b)]).unwrap();
    assert_eq!(sum[0].to_vec::<f32>().unwrap(), [3.0; 4]);
}

/// Host memory that tells when it is dropped.
struct Watched(Arc<HostMemory>, mpsc::Sender<()>);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.1.send(());
    }
}

fn watched(len: usize) -> (Watched, Arc<HostMemory>, mpsc::Receiver<()>) {
    let memory = Arc::new(HostMemory::from_slice(&vec![3.0_f32; len]));
    let (sender, dropped) = mpsc::channel();
    (Watched(Arc::clone(&memory), sender), memory, dropped)
}

#[test]
fn owned_host_memory_is_let_go_once_it_is_copied() {
    let (client, devices) = client(1);
    let (data, _memory, dropped) = watched(BUMP_LEN);
    let dims = [BUMP_LEN as i64];
    let place = &devices[0];
    let array = client
        .buffer_from_owned(data, DType::F32, &dims, place, Sharing::UntilCopied)
        .unwrap();
    dropped.recv().unwrap();
    assert_eq!(array.to_vec::<f32>().unwrap(), [3.0; BUMP_LEN]);
}

#[test]
fn zero_copy_memory_is_the_array_and_is_let_go_with_it() {
    let (client, devices) = client(1);
    let (data, memory, dropped) = watched(BUMP_LEN);
    let dims = [BUMP_LEN as i64];
    let place = &devices[0];
    let array = client
        .buffer_from_owned(data, DType::F32, &dims, place, Sharing::ZeroCopy)
        .unwrap();
    assert_eq!(
        array.address().unwrap(),
        memory.as_slice::<u8>().as_ptr() as usize
    );
    assert!(dropped.try_recv().is_err());
    drop(array);
    dropped.recv().unwrap();
}

#[test]
fn zero_copy_memory_is_not_written_even_if_the_array_is_donated() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let (data, memory, dropped) = watched(BUMP_LEN);
    let dims = [BUMP_LEN as i64];
    let place = &devices[0];
    let array = client
        .buffer_from_owned(data, DType::F32, &dims, place, Sharing::ZeroCopy)
        .unwrap();
    let bumped = bump
        .execute([Arg::Donate(array), Arg::Borrow(&one)])
        .unwrap();
    assert_eq!(bumped[0].to_vec::<f32>().unwrap(), [4.0; BUMP_LEN]);
    drop(bumped);
    dropped.recv().unwrap();
    assert_eq!(memory.as_slice::<f32>(), [3.0; BUMP_LEN]);
}

#[test]
fn a_download_gives_the_memory_back_and_outlives_its_array() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let bumped = bump
        .execute([Arg::Borrow(&one), Arg::Borrow(&one)])
        .unwrap()
        .remove(0);
    let waited = bumped
        .download_into(HostMemory::zeroed(BUMP_LEN * 4))
        .unwrap();
    let awaited = bumped.download_into(vec![0; BUMP_LEN * 4]).unwrap();
    let forgotten = bumped.download_into(vec![0; BUMP_LEN * 4]).unwrap();
    drop((bumped, forgotten));
    assert_eq!(waited.wait().unwrap().as_slice::<f32>(), [2.0; BUMP_LEN]);
    let bytes = block_on(awaited).unwrap();
    assert!(bytes.chunks(4).all(|chunk| chunk == 2.0_f32.to_le_bytes()));
}

#[test]
fn an_event_is_a_future_and_takes_callbacks() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let (outputs, done) = bump
        .execute_tracked([Arg::Borrow(&one), Arg::Borrow(&one)])
        .unwrap();
    let (sender, called) = mpsc::channel();
    done.on_ready(move |outcome| sender.send(outcome.is_ok()).unwrap())
        .unwrap();
    assert!(called.recv().unwrap());
    assert!(done.is_ready().unwrap());
    block_on(async {
        done.await?;
        outputs[0].ready()?.await
    })
    .unwrap();
}

#[test]
fn a_panic_in_a_callback_goes_no_further() {
    let (client, devices) = client(1);
    let array = four(&client, &devices[0], [0.0; 4]);
    array
        .ready()
        .unwrap()
        .on_ready(|_| panic!("as the test wants"))
        .unwrap();
    assert_eq!(array.to_vec::<f32>().unwrap(), [0.0; 4]);
}

#[test]
fn a_callback_may_drop_the_last_of_a_client() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    let one = bump_array(&client, &devices[0], 1.0);
    let (outputs, done) = bump
        .execute_tracked([Arg::Borrow(&one), Arg::Donate(one_more(&one))])
        .unwrap();
    let (sender, called) = mpsc::channel();
    let last = (outputs, client, devices, bump, one);
    done.on_ready(move |_| {
        drop(last);
        sender.send(()).unwrap();
    })
    .unwrap();
    drop(done);
    called.recv().unwrap();
}

fn one_more(array: &Buffer) -> Buffer {
    let device = array.device().expect("an array is on a device");
    let memory = device.default_memory().expect("a device has a memory");
    // Copying to where an array is already may be refused; then a copy by way of the host serves.
    array
        .copy_to_memory(&memory)
        .expect("a copy within a memory")
}

#[test]
fn a_compiler_error_surfaces_with_its_text() {
    let (client, _devices) = client(1);
    let text = "func.func public @main(%a: tensor<4xf32>) -> tensor<4xf32> { return %nothing : tensor<4xf32> }";
    let error = client
        .compile(text, &CompileOptions::default())
        .err()
        .unwrap();
    let Error::Call { call, message, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*call, "PJRT_Client_Compile");
    assert!(message.contains("undeclared SSA value"), "{message}");
    assert!(
        error.to_string().starts_with("PJRT_Client_Compile: "),
        "{error}"
    );
}

#[test]
fn overrides_reach_the_compiler() {
    let (client, _devices) = client(1);
    let with = |name: &str, value: Value| CompileOptions {
        overrides: vec![(name.into(), value)],
        ..CompileOptions::default()
    };
    client
        .compile(ADD, &with("xla_cpu_enable_fast_math", true.into()))
        .unwrap();
    let error = client
        .compile(ADD, &with("xla_no_such_flag", 1.into()))
        .err()
        .unwrap();
    assert!(error.to_string().contains("xla_no_such_flag"), "{error}");
}

#[test]
fn wrong_arguments_are_errors() {
    let (client, devices) = client(1);
    let add = compile(&client, ADD);
    let a = four(&client, &devices[0], [1.0; 4]);
    let error = add.execute([Arg::Borrow(&a)]).err().unwrap();
    assert_eq!(error.code(), Some(Code::InvalidArgument), "{error}");
    let short = client
        .buffer_from_slice(&[1.0_f32], &[1], &devices[0])
        .unwrap();
    let error = add
        .execute([Arg::Borrow(&a), Arg::Borrow(&short)])
        .err()
        .unwrap();
    assert_eq!(error.code(), Some(Code::InvalidArgument), "{error}");
    // A failed launch leaves the program usable.
    add.execute([Arg::Borrow(&a), Arg::Borrow(&a)]).unwrap();
}

#[test]
fn host_memory_of_the_wrong_size_is_refused_before_the_plugin_sees_it() {
    let (client, devices) = client(1);
    let error = client
        .buffer_from_slice(&[1.0_f32; 3], &[4], &devices[0])
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            Error::HostSize {
                needed: 16,
                got: 12
            }
        ),
        "{error}"
    );
    let error = client
        .buffer_from_slice(&[1.0_f32], &[-1], &devices[0])
        .err()
        .unwrap();
    assert!(matches!(error, Error::Dimensions(_)), "{error}");
    let a = four(&client, &devices[0], [1.0; 4]);
    let error = a.copy_to_host(&mut [0; 15]).err().unwrap();
    assert!(
        matches!(
            error,
            Error::HostSize {
                needed: 16,
                got: 15
            }
        ),
        "{error}"
    );
    let error = a.download_into(vec![0; 17]).err().unwrap();
    assert!(
        matches!(
            error,
            Error::HostSize {
                needed: 16,
                got: 17
            }
        ),
        "{error}"
    );
    let error = a.to_vec::<i32>().err().unwrap();
    assert!(matches!(error, Error::ElementType { .. }), "{error}");
}

#[test]
fn handles_of_another_client_are_refused() {
    let (ours, our_devices) = client(1);
    let (theirs, their_devices) = client(1);
    let add = compile(&ours, ADD);
    let a = four(&ours, &our_devices[0], [1.0; 4]);
    let b = four(&theirs, &their_devices[0], [1.0; 4]);
    let error = add
        .execute([Arg::Borrow(&a), Arg::Borrow(&b)])
        .err()
        .unwrap();
    assert!(matches!(error, Error::Foreign("argument")), "{error}");
    let error = ours
        .buffer_from_slice(&[0_u8], &[1], &their_devices[0])
        .err()
        .unwrap();
    assert!(matches!(error, Error::Foreign("place")), "{error}");
    assert!(matches!(
        a.copy_to_device(&their_devices[0]),
        Err(Error::Foreign("device"))
    ));
}

#[test]
fn a_program_is_split_over_two_devices() {
    let (client, devices) = client(2);
    let text = "module @dot attributes {mhlo.num_partitions = 2 : i32, mhlo.num_replicas = 1 : i32} {
      sdy.mesh @mesh = <[\"tp\"=2]>
      func.func public @main(
          %a: tensor<2x4xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {\"tp\"}]>},
          %b: tensor<4x2xf32> {sdy.sharding = #sdy.sharding<@mesh, [{\"tp\"}, {}]>})
          -> (tensor<2x2xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}) {
        %c = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<2x4xf32>, tensor<4x2xf32>) -> tensor<2x2xf32>
        return %c : tensor<2x2xf32>
      }
    }";
    let dot = client.compile(text, &CompileOptions::sharded(2)).unwrap();
    assert_eq!((dot.n_devices(), dot.n_outputs()), (2, 1));
    assert_eq!(dot.executable().n_partitions().unwrap(), 2);
    // Each device has two columns of `a` and two rows of `b`.
    let shard = |device, a: [f32; 4], b: [f32; 4]| {
        let a = client.buffer_from_slice(&a, &[2, 2], device).unwrap();
        let b = client.buffer_from_slice(&b, &[2, 2], device).unwrap();
        [Arg::Donate(a), Arg::Donate(b)]
    };
    let on = dot.devices().unwrap();
    let args = [
        shard(&on[0], [1., 2., 5., 6.], [1., 0., 0., 1.]),
        shard(&on[1], [3., 4., 7., 8.], [1., 0., 0., 1.]),
    ];
    for outputs in dot.execute_sharded(args).unwrap() {
        assert_eq!(outputs[0].to_vec::<f32>().unwrap(), [4., 6., 12., 14.]);
    }
    let a = four(&client, &devices[0], [1.0; 4]);
    let error = dot.execute([Arg::Borrow(&a)]).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Arguments {
                lists: 1,
                devices: 2
            }
        ),
        "{error}"
    );
    let uneven = [vec![Arg::Borrow(&a)], vec![]];
    assert!(matches!(
        dot.execute_sharded(uneven),
        Err(Error::Arguments { .. })
    ));
}

#[test]
fn a_device_assignment_decides_where_a_program_runs() {
    let (client, devices) = client(2);
    let options = CompileOptions {
        devices: Some(DeviceAssignment {
            partitions: vec![vec![1]],
        }),
        ..CompileOptions::default()
    };
    let add = client.compile(ADD, &options).unwrap();
    assert!(add.devices().unwrap() == devices[1..]);
    let a = four(&client, &devices[1], [1.0; 4]);
    let sum = add.execute([Arg::Borrow(&a), Arg::Borrow(&a)]).unwrap();
    assert!(sum[0].device().unwrap() == devices[1]);
    let here = sum[0].copy_to_device(&devices[0]).unwrap();
    assert_eq!(here.to_vec::<f32>().unwrap(), [2.0; 4]);
}

#[test]
fn a_program_survives_serialization() {
    let (client, devices) = client(1);
    let add = compile(&client, ADD);
    let bytes = add.executable().serialize().unwrap();
    assert!(!bytes.is_empty());
    drop(add);
    let add = client.deserialize(&bytes).unwrap();
    let a = four(&client, &devices[0], [1.5; 4]);
    let sum = add.execute([Arg::Borrow(&a), Arg::Borrow(&a)]).unwrap();
    assert_eq!(sum[0].to_vec::<f32>().unwrap(), [3.0; 4]);
    let error = client.deserialize(b"no program").err().unwrap();
    assert!(matches!(
        error,
        Error::Call {
            call: "PJRT_Executable_DeserializeAndLoad",
            ..
        }
    ));
}

#[test]
fn a_program_says_what_it_needs_and_costs() {
    let (client, _devices) = client(1);
    let bump = compile(&client, BUMP);
    let program = bump.executable();
    assert!(program.name().unwrap().contains("bump"));
    assert_eq!(program.n_outputs().unwrap(), 1);
    assert_eq!(
        (
            program.n_replicas().unwrap(),
            program.n_partitions().unwrap()
        ),
        (1, 1)
    );
    let bytes = BUMP_LEN as i64 * 4;
    let memory = program.memory().unwrap();
    assert_eq!(
        (memory.arguments, memory.results, memory.aliased),
        (2 * bytes, bytes, bytes)
    );
    assert!(memory.total() >= 2 * bytes);
    match program.cost() {
        Ok(cost) => assert_eq!(cost.flops, Some(BUMP_LEN as f64)),
        Err(error) => assert_eq!(error.code(), Some(Code::Unimplemented)),
    }
    program.code_size().unwrap();
}

#[test]
fn equal_programs_have_equal_fingerprints() {
    let (client, _devices) = client(1);
    let fingerprint = |text| compile(&client, text).executable().fingerprint();
    match (fingerprint(ADD), fingerprint(ADD), fingerprint(BUMP)) {
        (Ok(a), Ok(b), Ok(c)) => assert!(a == b && a != c),
        (Err(error), ..) => assert_eq!(error.code(), Some(Code::Unimplemented)),
        _ => panic!("one program has a fingerprint and another has not"),
    }
}

#[test]
fn programs_run_on_many_threads_at_once() {
    let (client, devices) = client(1);
    let bump = compile(&client, BUMP);
    thread::scope(|scope| {
        for seed in 0..4 {
            let (client, bump, device) = (&client, &bump, &devices[0]);
            scope.spawn(move || {
                let one = bump_array(client, device, 1.0);
                let mut state = bump_array(client, device, seed as f32);
                for _ in 0..20 {
                    state = bump
                        .execute([Arg::Donate(state), Arg::Borrow(&one)])
                        .unwrap()
                        .remove(0);
                }
                assert_eq!(
                    state.to_vec::<f32>().unwrap(),
                    [seed as f32 + 20.0; BUMP_LEN]
                );
            });
        }
    });
}

#[test]
fn a_topology_without_a_name_is_described_or_refused() {
    match Topology::create(&plugin(), "", &[]) {
        Ok(topology) => {
            assert_eq!(topology.platform_name().unwrap(), "cpu");
            assert!(!topology.devices().unwrap().is_empty());
        }
        Err(error) => {
            assert!(matches!(
                error,
                Error::Call {
                    call: "PJRT_TopologyDescription_Create",
                    ..
                }
            ));
        }
    }
}

#[test]
fn an_option_that_no_client_takes_is_an_error() {
    let error = Client::create(&plugin(), &[("cpu_device_count", "many".into())])
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            Error::Call {
                call: "PJRT_Client_Create",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_file_that_is_no_library_does_not_load() {
    let error = Plugin::load("/nonexistent/plugin.so").err().unwrap();
    assert!(matches!(error, Error::Load { .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent/plugin.so"));
    let error = Plugin::load(file!()).err().unwrap();
    assert!(matches!(error, Error::Load { .. }), "{error}");
}

#[test]
fn a_library_that_is_no_plugin_does_not_load() {
    let error = Plugin::load("libm.so.6").err().unwrap();
    assert!(matches!(error, Error::NotAPlugin { .. }), "{error}");
    assert!(error.to_string().contains("libm.so.6"));
}
