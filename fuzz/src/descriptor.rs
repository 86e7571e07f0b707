//! The message type of the Protobuf target.

use prost_reflect::prost::Message;
use prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use prost_reflect::prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

fn member(name: &str, number: i32, type_: Type, type_name: Option<&str>) -> FieldDescriptorProto {
    FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        label: Some(Label::Optional.into()),
        r#type: Some(type_.into()),
        type_name: type_name.map(str::to_owned),
        ..FieldDescriptorProto::default()
    }
}

fn file(name: &str, package: &str, message: &str, field: Vec<FieldDescriptorProto>) -> FileDescriptorProto {
    FileDescriptorProto {
        name: Some(name.to_owned()),
        package: Some(package.to_owned()),
        syntax: Some("proto3".to_owned()),
        message_type: vec![DescriptorProto { name: Some(message.to_owned()), field, ..DescriptorProto::default() }],
        ..FileDescriptorProto::default()
    }
}

/// A FileDescriptorSet with `google.protobuf.Timestamp` and `p.Reading`, whose member `below` is a `p.Reading` too.
pub fn encoded() -> Vec<u8> {
    let time = vec![member("seconds", 1, Type::Int64, None), member("nanos", 2, Type::Int32, None)];
    let reading = vec![
        member("ts", 1, Type::Message, Some(".google.protobuf.Timestamp")),
        member("rms", 2, Type::Double, None),
        member("count", 3, Type::Sint64, None),
        member("running", 4, Type::Bool, None),
        member("state", 5, Type::String, None),
        member("at", 6, Type::Fixed32, None),
        member("below", 7, Type::Message, Some(".p.Reading")),
    ];
    let mut own = file("p.proto", "p", "Reading", reading);
    own.dependency.push("google/protobuf/timestamp.proto".to_owned());
    let file = vec![file("google/protobuf/timestamp.proto", "google.protobuf", "Timestamp", time), own];
    FileDescriptorSet { file }.encode_to_vec()
}
