//! What the compiler is told beside the program: written as XLA's `CompileOptionsProto`.

use crate::Value;

/// How to compile a program. The default is one device, nothing special.
#[derive(Clone, Debug, PartialEq)]
pub struct CompileOptions {
    /// Copies of the program that run side by side on different data.
    pub n_replicas: u32,
    /// Devices that share the work of one copy.
    pub n_partitions: u32,
    /// How work is shared among partitions.
    pub partitioner: Partitioner,
    /// Which devices run it; the platform's own order if `None`.
    pub devices: Option<DeviceAssignment>,
    /// The one device to compile for; the platform's choice if `None`.
    pub device_ordinal: Option<u32>,
    /// Compiler settings by name, such as `xla_cpu_enable_fast_math`. Unknown names are errors when compiling.
    pub overrides: Vec<(String, Value)>,
}

/// Who splits a program into partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partitioner {
    /// Nobody: the program is for one device, or written per device.
    None,
    /// XLA's, from `mhlo.sharding` annotations.
    Gspmd,
    /// Shardy, from `sdy.sharding` annotations.
    Shardy,
}

/// Device ids of one launch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceAssignment {
    /// Device ids, by partition and then by replica.
    pub partitions: Vec<Vec<i64>>,
}

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            n_replicas: 1,
            n_partitions: 1,
            partitioner: Partitioner::None,
            devices: None,
            device_ordinal: None,
            overrides: Vec::new(),
        }
    }
}

impl CompileOptions {
    /// One program over `n_partitions` devices, split by Shardy.
    pub fn sharded(n_partitions: u32) -> Self {
        Self {
            n_partitions,
            partitioner: Partitioner::Shardy,
            ..Self::default()
        }
    }

    /// The serialized `CompileOptionsProto`. Equal options give equal bytes, so it can be part of a cache key.
    pub fn to_proto(&self) -> Vec<u8> {
        let mut build = Message::default();
        build.int(1, self.device_ordinal.map_or(-1, i64::from));
        build.int(4, i64::from(self.n_replicas));
        build.int(5, i64::from(self.n_partitions));
        if self.partitioner != Partitioner::None {
            build.int(6, 1);
        }
        if let Some(devices) = &self.devices {
            build.message(9, &devices.to_message());
        }
        if self.partitioner == Partitioner::Shardy {
            build.int(19, 1);
        }
        let mut options = Message::default();
        options.message(3, &build);
        for (name, value) in &self.overrides {
            let mut entry = Message::default();
            entry.bytes(1, name.as_bytes());
            entry.message(2, &override_value(value));
            options.message(7, &entry);
        }
        options.0
    }
}

/// An `OptionOverrideProto`. It has no lists: a list goes as comma-separated text.
fn override_value(value: &Value) -> Message {
    let mut message = Message::default();
    match value {
        Value::String(text) => message.bytes(1, text.as_bytes()),
        Value::Bool(bool) => message.int(2, i64::from(*bool)),
        Value::Int64(int) => message.int(3, *int),
        Value::Float(float) => message.double(4, f64::from(*float)),
        Value::Int64List(list) => {
            let texts: Vec<String> = list.iter().map(i64::to_string).collect();
            message.bytes(1, texts.join(",").as_bytes());
        }
    }
    message
}

impl DeviceAssignment {
    /// A `DeviceAssignmentProto`.
    fn to_message(&self) -> Message {
        let mut message = Message::default();
        message.int(1, self.partitions.first().map_or(0, Vec::len) as i64);
        message.int(2, self.partitions.len() as i64);
        for replicas in &self.partitions {
            let mut packed = Message::default();
            replicas.iter().for_each(|&id| packed.varint(id as u64));
            let mut devices = Message::default();
            devices.message(1, &packed);
            message.message(3, &devices);
        }
        message
    }
}

/// A protobuf message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    /// An integer or bool; negative numbers take ten bytes, as protobuf has it.
    fn int(&mut self, field: u32, value: i64) {
        self.tag(field, 0);
        self.varint(value as u64);
    }

    fn double(&mut self, field: u32, value: f64) {
        self.tag(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn message(&mut self, field: u32, value: &Self) {
        self.bytes(field, &value.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_options_name_one_replica_one_partition_and_no_device() {
        let mut expected = vec![0x1a, 15, 0x08];
        expected.extend([0xff; 9]);
        expected.extend([0x01, 0x20, 1, 0x28, 1]);
        assert_eq!(CompileOptions::default().to_proto(), expected);
    }

    #[test]
    fn sharded_options_turn_both_partitioners_flags_on() {
        let options = CompileOptions {
            device_ordinal: Some(0),
            ..CompileOptions::sharded(8)
        };
        let expected = [0x1a, 11, 0x08, 0, 0x20, 1, 0x28, 8, 0x30, 1, 0x98, 0x01, 1];
        assert_eq!(options.to_proto(), expected);
    }

    #[test]
    fn a_device_assignment_lists_the_devices_of_each_partition() {
        let devices = DeviceAssignment {
            partitions: vec![vec![3], vec![300]],
        };
        let expected = [
            0x08, 1, 0x10, 2, 0x1a, 3, 0x0a, 1, 3, 0x1a, 4, 0x0a, 2, 0xac, 0x02,
        ];
        assert_eq!(devices.to_message().0, expected);
    }

    #[test]
    fn overrides_are_a_map_from_name_to_typed_value() {
        let options = CompileOptions {
            overrides: vec![("a".into(), true.into()), ("b".into(), "c".into())],
            ..CompileOptions::default()
        };
        let proto = options.to_proto();
        let expected = [
            0x3a, 7, 0x0a, 1, b'a', 0x12, 2, 0x10, 1, 0x3a, 8, 0x0a, 1, b'b', 0x12, 3, 0x0a, 1,
            b'c',
        ];
        assert!(proto.ends_with(&expected), "{proto:x?}");
    }
}
