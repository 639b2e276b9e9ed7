//! The part of the PJRT C API that this crate calls, declared by hand.
//!
//! Not a full translation of `pjrt_c_api.h`, and nothing here is public. Layouts follow API 0.81; the few structs
//! that grew since carry the later trailing fields too, because a newer plugin insists on its own size while an
//! older one reads only the front it knows. Invariant: every struct is valid when all its bytes are zero, and
//! `struct_size` is the end of the last field, without the padding after it.

use std::ffi::{c_char, c_int, c_void};

/// Any function of the table, before its type is known.
pub(crate) type RawFn = unsafe extern "C" fn();

/// A function of the table that takes `A` and may fail.
pub(crate) type Function<A> = unsafe extern "C" fn(*mut A) -> *mut Error;

/// The arguments of one C function, which thereby name the function.
pub(crate) trait Call {
    /// The function's name in the header.
    const NAME: &'static str;
    /// Its place in the table of functions.
    const SLOT: usize;
}

macro_rules! opaque {
    ($($name:ident)*) => { $(
        #[repr(C)]
        pub(crate) struct $name { _private: [u8; 0] }
    )* };
}

opaque! {
    Error Event Client Device Memory DeviceDescription Topology Executable LoadedExecutable Buffer
    SerializedExecutable
}

const fn last(ends: &[usize]) -> usize {
    ends[ends.len() - 1]
}

/// Declares structs that begin with `struct_size` and `extension_start`.
macro_rules! structs {
    ($($name:ident { $($field:ident: $ty:ty,)* })*) => { $(
        #[repr(C)]
        pub(crate) struct $name {
            pub(crate) struct_size: usize,
            pub(crate) extension_start: *mut ExtensionBase,
            $(pub(crate) $field: $ty,)*
        }

        impl $name {
            /// Where the last field ends.
            pub(crate) const SIZE: usize = last(&[
                2 * size_of::<usize>(),
                $(std::mem::offset_of!($name, $field) + size_of::<$ty>(),)*
            ]);

            pub(crate) const fn new() -> Self {
                // SAFETY: all fields are integers, bools, raw pointers, optional function pointers or plain
                // structs and unions of these, for all of which zero is a valid value.
                let mut args: Self = unsafe { std::mem::zeroed() };
                args.struct_size = Self::SIZE;
                args
            }
        }
    )* };
}

/// Declares the arguments of functions: `Struct "C name" slot { fields }`.
macro_rules! calls {
    ($($name:ident $call:literal $slot:literal { $($field:ident: $ty:ty,)* })*) => {
        structs! { $($name { $($field: $ty,)* })* }
        $(
            impl Call for $name {
                const NAME: &'static str = $call;
                const SLOT: usize = $slot;
            }
        )*
    };
}

/// What stands in front of the function table in `PJRT_Api`.
#[repr(C)]
pub(crate) struct ApiHeader {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) version: ApiVersion,
}

#[repr(C)]
pub(crate) struct ApiVersion {
    pub(crate) struct_size: usize,
    pub(crate) extension_start: *mut ExtensionBase,
    pub(crate) major: c_int,
    pub(crate) minor: c_int,
}

/// A link in the chain of extensions.
#[repr(C)]
pub(crate) struct ExtensionBase {
    pub(crate) struct_size: usize,
    pub(crate) kind: c_int,
    pub(crate) next: *mut ExtensionBase,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union NamedValuePayload {
    pub(crate) string: *const c_char,
    pub(crate) int64: i64,
    pub(crate) int64_list: *const i64,
    pub(crate) float: f32,
    pub(crate) bool: bool,
}

pub(crate) mod named_value {
    //! Values of `PJRT_NamedValue_Type`.
    pub(crate) const STRING: i32 = 0;
    pub(crate) const INT64: i32 = 1;
    pub(crate) const INT64_LIST: i32 = 2;
    pub(crate) const FLOAT: i32 = 3;
    pub(crate) const BOOL: i32 = 4;
}

pub(crate) mod host_buffer_semantics {
    //! Values of `PJRT_HostBufferSemantics`.
    pub(crate) const IMMUTABLE_ONLY_DURING_CALL: i32 = 0;
    pub(crate) const IMMUTABLE_UNTIL_TRANSFER_COMPLETES: i32 = 1;
    pub(crate) const IMMUTABLE_ZERO_COPY: i32 = 2;
}

/// Table places of the three functions that do not report errors themselves.
pub(crate) const ERROR_DESTROY_SLOT: usize = 0;
pub(crate) const ERROR_MESSAGE_SLOT: usize = 1;
pub(crate) const ERROR_GET_CODE_SLOT: usize = 2;

structs! {
    NamedValue {
        name: *const c_char, name_size: usize, kind: c_int, payload: NamedValuePayload, value_size: usize,
    }
    Program { code: *const c_char, code_size: usize, format: *const c_char, format_size: usize, }
    // The tiled variant of the layout's union is the larger one, and the only one used here.
    TiledLayout {
        minor_to_major: *const i64, minor_to_major_size: usize, tile_dims: *const i64,
        tile_dim_sizes: *const usize, num_tiles: usize,
    }
    MemoryLayout { tiled: TiledLayout, kind: c_int, }
    ExecuteOptions {
        send_callbacks: *mut c_void, recv_callbacks: *mut c_void, num_send_ops: usize, num_recv_ops: usize,
        launch_id: c_int, non_donatable_input_indices: *const i64, num_non_donatable_input_indices: usize,
        context: *mut c_void, call_location: *const c_char, num_tasks: usize, task_ids: *mut c_int,
        incarnation_ids: *mut i64, multi_slice_config: *mut c_void,
        use_major_to_minor_data_layout_for_callbacks: bool, hlo_output_callbacks: *mut c_void,
        num_hlo_output_callbacks: usize,
    }
    ErrorDestroy { error: *mut Error, }
    ErrorMessage { error: *const Error, message: *const c_char, message_size: usize, }
    ErrorGetCode { error: *const Error, code: c_int, }
}

calls! {
    PluginInitialize "PJRT_Plugin_Initialize" 3 {}
    PluginAttributes "PJRT_Plugin_Attributes" 4 { attributes: *const NamedValue, num_attributes: usize, }

    EventDestroy "PJRT_Event_Destroy" 5 { event: *mut Event, }
    EventIsReady "PJRT_Event_IsReady" 6 { event: *mut Event, is_ready: bool, }
    EventAwait "PJRT_Event_Await" 8 { event: *mut Event, }
    EventOnReady "PJRT_Event_OnReady" 9 {
        event: *mut Event, callback: Option<unsafe extern "C" fn(*mut Error, *mut c_void)>, user_arg: *mut c_void,
    }

    ClientCreate "PJRT_Client_Create" 10 {
        create_options: *const NamedValue, num_options: usize, kv_get_callback: Option<RawFn>,
        kv_get_user_arg: *mut c_void, kv_put_callback: Option<RawFn>, kv_put_user_arg: *mut c_void,
        client: *mut Client, kv_try_get_callback: Option<RawFn>, kv_try_get_user_arg: *mut c_void,
    }
    ClientDestroy "PJRT_Client_Destroy" 11 { client: *mut Client, }
    ClientPlatformName "PJRT_Client_PlatformName" 12 { client: *mut Client, name: *const c_char, name_size: usize, }
    ClientPlatformVersion "PJRT_Client_PlatformVersion" 14 {
        client: *mut Client, version: *const c_char, version_size: usize,
    }
    ClientDevices "PJRT_Client_Devices" 15 { client: *mut Client, devices: *const *mut Device, num_devices: usize, }
    ClientAddressableDevices "PJRT_Client_AddressableDevices" 16 {
        client: *mut Client, devices: *const *mut Device, num_devices: usize,
    }
    ClientCompile "PJRT_Client_Compile" 20 {
        client: *mut Client, program: *const Program, compile_options: *const c_char,
        compile_options_size: usize, executable: *mut LoadedExecutable,
    }
    ClientBufferFromHostBuffer "PJRT_Client_BufferFromHostBuffer" 22 {
        client: *mut Client, data: *const c_void, kind: c_int, dims: *const i64, num_dims: usize,
        byte_strides: *const i64, num_byte_strides: usize, host_buffer_semantics: c_int, device: *mut Device,
        memory: *mut Memory, device_layout: *mut MemoryLayout, done_with_host_buffer: *mut Event,
        buffer: *mut Buffer,
    }

    DeviceDescriptionId "PJRT_DeviceDescription_Id" 23 { description: *mut DeviceDescription, id: c_int, }
    DeviceDescriptionProcessIndex "PJRT_DeviceDescription_ProcessIndex" 24 {
        description: *mut DeviceDescription, process_index: c_int,
    }
    DeviceDescriptionAttributes "PJRT_DeviceDescription_Attributes" 25 {
        description: *mut DeviceDescription, num_attributes: usize, attributes: *const NamedValue,
    }
    DeviceDescriptionKind "PJRT_DeviceDescription_Kind" 26 {
        description: *mut DeviceDescription, kind: *const c_char, kind_size: usize,
    }
    DeviceDescriptionToString "PJRT_DeviceDescription_ToString" 28 {
        description: *mut DeviceDescription, text: *const c_char, text_size: usize,
    }

    DeviceGetDescription "PJRT_Device_GetDescription" 29 {
        device: *mut Device, description: *mut DeviceDescription,
    }
    DeviceIsAddressable "PJRT_Device_IsAddressable" 30 { device: *mut Device, is_addressable: bool, }
    DeviceLocalHardwareId "PJRT_Device_LocalHardwareId" 31 { device: *mut Device, id: c_int, }
    DeviceAddressableMemories "PJRT_Device_AddressableMemories" 32 {
        device: *mut Device, memories: *const *mut Memory, num_memories: usize,
    }
    DeviceDefaultMemory "PJRT_Device_DefaultMemory" 33 { device: *mut Device, memory: *mut Memory, }
    DeviceMemoryStats "PJRT_Device_MemoryStats" 34 {
        device: *mut Device, bytes_in_use: i64,
        peak_bytes_in_use: i64, peak_bytes_in_use_is_set: bool,
        num_allocs: i64, num_allocs_is_set: bool,
        largest_alloc_size: i64, largest_alloc_size_is_set: bool,
        bytes_limit: i64, bytes_limit_is_set: bool,
        bytes_reserved: i64, bytes_reserved_is_set: bool,
        peak_bytes_reserved: i64, peak_bytes_reserved_is_set: bool,
        bytes_reservable_limit: i64, bytes_reservable_limit_is_set: bool,
        largest_free_block_bytes: i64, largest_free_block_bytes_is_set: bool,
        pool_bytes: i64, pool_bytes_is_set: bool,
        peak_pool_bytes: i64, peak_pool_bytes_is_set: bool,
        peak_allocated_bytes: i64, peak_allocated_bytes_is_set: bool,
    }

    MemoryId "PJRT_Memory_Id" 35 { memory: *mut Memory, id: c_int, }
    MemoryKind "PJRT_Memory_Kind" 36 { memory: *mut Memory, kind: *const c_char, kind_size: usize, }

    ExecutableDestroy "PJRT_Executable_Destroy" 40 { executable: *mut Executable, }
    ExecutableName "PJRT_Executable_Name" 41 { executable: *mut Executable, name: *const c_char, name_size: usize, }
    ExecutableNumReplicas "PJRT_Executable_NumReplicas" 42 { executable: *mut Executable, num_replicas: usize, }
    ExecutableNumPartitions "PJRT_Executable_NumPartitions" 43 {
        executable: *mut Executable, num_partitions: usize,
    }
    ExecutableNumOutputs "PJRT_Executable_NumOutputs" 44 { executable: *mut Executable, num_outputs: usize, }
    ExecutableSizeOfGeneratedCode "PJRT_Executable_SizeOfGeneratedCodeInBytes" 45 {
        executable: *mut Executable, size_in_bytes: i64,
    }
    ExecutableGetCostAnalysis "PJRT_Executable_GetCostAnalysis" 46 {
        executable: *mut Executable, num_properties: usize, properties: *const NamedValue,
    }
    ExecutableSerialize "PJRT_Executable_Serialize" 49 {
        executable: *const Executable, bytes: *const c_char, bytes_size: usize,
        serialized: *mut SerializedExecutable,
        deleter: Option<unsafe extern "C" fn(*mut SerializedExecutable)>,
    }

    LoadedExecutableDestroy "PJRT_LoadedExecutable_Destroy" 50 { executable: *mut LoadedExecutable, }
    LoadedExecutableGetExecutable "PJRT_LoadedExecutable_GetExecutable" 51 {
        loaded_executable: *mut LoadedExecutable, executable: *mut Executable,
    }
    LoadedExecutableAddressableDevices "PJRT_LoadedExecutable_AddressableDevices" 52 {
        executable: *mut LoadedExecutable, devices: *const *mut Device, num_devices: usize,
    }
    LoadedExecutableExecute "PJRT_LoadedExecutable_Execute" 55 {
        executable: *mut LoadedExecutable, options: *mut ExecuteOptions,
        argument_lists: *const *const *mut Buffer, num_devices: usize, num_args: usize,
        output_lists: *const *mut *mut Buffer, device_complete_events: *mut *mut Event,
        execute_device: *mut Device,
    }
    ExecutableDeserializeAndLoad "PJRT_Executable_DeserializeAndLoad" 56 {
        client: *mut Client, serialized: *const c_char, serialized_size: usize,
        loaded_executable: *mut LoadedExecutable, overridden_options: *const c_char,
        overridden_options_size: usize, load_options: *mut c_void,
    }

    BufferDestroy "PJRT_Buffer_Destroy" 58 { buffer: *mut Buffer, }
    BufferElementType "PJRT_Buffer_ElementType" 59 { buffer: *mut Buffer, kind: c_int, }
    BufferDimensions "PJRT_Buffer_Dimensions" 60 { buffer: *mut Buffer, dims: *const i64, num_dims: usize, }
    BufferOnDeviceSize "PJRT_Buffer_OnDeviceSizeInBytes" 64 { buffer: *mut Buffer, size: usize, }
    BufferDevice "PJRT_Buffer_Device" 65 { buffer: *mut Buffer, device: *mut Device, }
    BufferMemory "PJRT_Buffer_Memory" 66 { buffer: *mut Buffer, memory: *mut Memory, }
    BufferDelete "PJRT_Buffer_Delete" 67 { buffer: *mut Buffer, }
    BufferCopyToDevice "PJRT_Buffer_CopyToDevice" 69 {
        buffer: *mut Buffer, device: *mut Device, copy: *mut Buffer,
    }
    BufferToHostBuffer "PJRT_Buffer_ToHostBuffer" 70 {
        buffer: *mut Buffer, host_layout: *mut MemoryLayout, dst: *mut c_void, dst_size: usize, event: *mut Event,
    }
    BufferReadyEvent "PJRT_Buffer_ReadyEvent" 72 { buffer: *mut Buffer, event: *mut Event, }
    BufferUnsafePointer "PJRT_Buffer_UnsafePointer" 73 { buffer: *mut Buffer, address: usize, }

    TopologyCreate "PJRT_TopologyDescription_Create" 82 {
        name: *const c_char, name_size: usize, create_options: *const NamedValue, num_options: usize,
        topology: *mut Topology,
    }
    TopologyDestroy "PJRT_TopologyDescription_Destroy" 83 { topology: *mut Topology, }
    TopologyPlatformName "PJRT_TopologyDescription_PlatformName" 84 {
        topology: *const Topology, name: *const c_char, name_size: usize,
    }
    TopologyPlatformVersion "PJRT_TopologyDescription_PlatformVersion" 85 {
        topology: *mut Topology, version: *const c_char, version_size: usize,
    }
    TopologyDevices "PJRT_TopologyDescription_GetDeviceDescriptions" 86 {
        topology: *const Topology, descriptions: *const *mut DeviceDescription, num_descriptions: usize,
    }
    TopologyAttributes "PJRT_TopologyDescription_Attributes" 88 {
        topology: *mut Topology, attributes: *const NamedValue, num_attributes: usize,
    }

    Compile "PJRT_Compile" 89 {
        topology: *const Topology, program: *const Program, compile_options: *const c_char,
        compile_options_size: usize, client: *mut Client, executable: *mut Executable,
    }

    BufferCopyToMemory "PJRT_Buffer_CopyToMemory" 92 {
        buffer: *mut Buffer, memory: *mut Memory, copy: *mut Buffer,
    }
    ExecutableFingerprint "PJRT_Executable_Fingerprint" 94 {
        executable: *mut Executable, fingerprint: *const c_char, fingerprint_size: usize,
    }
    ExecutableGetCompiledMemoryStats "PJRT_Executable_GetCompiledMemoryStats" 96 {
        executable: *mut Executable, generated_code_size_in_bytes: i64, argument_size_in_bytes: i64,
        output_size_in_bytes: i64, alias_size_in_bytes: i64, temp_size_in_bytes: i64,
        host_generated_code_size_in_bytes: i64, host_argument_size_in_bytes: i64,
        host_output_size_in_bytes: i64, host_alias_size_in_bytes: i64, host_temp_size_in_bytes: i64,
        peak_memory_in_bytes: i64, total_size_in_bytes: i64, total_allocation_bytes: i64,
        indefinite_allocations: i64, peak_unpadded_heap_bytes: i64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_c_header() {
        assert_eq!(size_of::<ApiVersion>(), 24);
        assert_eq!(size_of::<ApiHeader>(), 40);
        assert_eq!(size_of::<NamedValue>(), 56);
        assert_eq!(TiledLayout::SIZE, 56);
        assert_eq!(MemoryLayout::SIZE, 76);
        assert_eq!(ExecuteOptions::SIZE, 144);
        assert_eq!(PluginInitialize::SIZE, 16);
        assert_eq!(EventIsReady::SIZE, 25);
        assert_eq!(ClientCreate::SIZE, 88);
        assert_eq!(ClientBufferFromHostBuffer::SIZE, 120);
        assert_eq!(DeviceMemoryStats::SIZE, 201);
        assert_eq!(LoadedExecutableExecute::SIZE, 80);
        assert_eq!(ExecutableDeserializeAndLoad::SIZE, 72);
        assert_eq!(ExecutableGetCompiledMemoryStats::SIZE, 144);
        assert_eq!(BufferToHostBuffer::SIZE, 56);
        assert_eq!(Compile::SIZE, 64);
    }
}
