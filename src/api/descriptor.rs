//! The FileDescriptorSet of the format Protobuf, as a ConfigMap holds it.

use k8s_openapi::api::core::v1::ConfigMap;

use super::condition::Cause;
use super::reason::Reason;
use super::reference::DescriptorReference;

/// The longest FileDescriptorSet, in bytes: in base64 it stands in the ConfigMap of the workers, which holds 1 MiB.
pub const MAX_DESCRIPTOR: usize = 512 * 1024;

/// The FileDescriptorSet in a ConfigMap, or what is wrong with it.
///
/// # Errors
/// When it is not there, or too large.
pub fn read(map: Option<ConfigMap>, reference: &DescriptorReference) -> Result<Vec<u8>, Cause> {
    let DescriptorReference { name, key } = reference;
    let Some(map) = map else {
        let message = format!("there is no ConfigMap {name} in this namespace: kubectl create configmap {name} --from-file={key}");
        return Err(Cause::new(Reason::DescriptorNotFound, message));
    };
    let Some(value) = map.binary_data.and_then(|mut data| data.remove(key)) else {
        let message =
            format!("ConfigMap {name} has no key {key} in binaryData: kubectl create configmap {name} --from-file={key} puts it there");
        return Err(Cause::new(Reason::DescriptorNotFound, message));
    };
    if value.0.len() > MAX_DESCRIPTOR {
        let message = format!(
            "ConfigMap {name}, key {key}: expected at most {MAX_DESCRIPTOR} bytes, found {}; write it without --include_source_info",
            value.0.len()
        );
        return Err(Cause::new(Reason::DescriptorTooLarge, message));
    }
    Ok(value.0)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    #[test]
    fn what_may_be_wrong_with_a_descriptor() {
        let map = |key: &str, length: usize| {
            Some(ConfigMap { binary_data: Some([(key.to_owned(), ByteString(vec![0; length]))].into()), ..ConfigMap::default() })
        };
        for (map, reason) in [
            (None, Some("DescriptorNotFound")),
            (Some(ConfigMap::default()), Some("DescriptorNotFound")),
            (map("other", 1), Some("DescriptorNotFound")),
            (map("descriptor.pb", MAX_DESCRIPTOR + 1), Some("DescriptorTooLarge")),
            (map("descriptor.pb", MAX_DESCRIPTOR), None),
        ] {
            let reference = DescriptorReference { name: "schema".to_owned(), key: "descriptor.pb".to_owned() };
            assert_eq!(read(map, &reference).err().map(|cause| cause.reason.as_str()), reason);
        }
    }
}
