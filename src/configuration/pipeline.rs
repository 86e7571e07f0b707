//! The validation of a Pipeline's spec, for the operator and for the dry run: one implementation, so that both agree.

use kube::core::Selector;

use crate::api::PipelineSpec;
use crate::api::condition::Cause;
use crate::api::reason::Reason;
use crate::api::topic::TopicPattern;
use crate::decode::{CompileError, Decoder};
use crate::sink::timescale::schema::{Desired, desired};
use crate::state::owner::Owner;

/// A valid spec, compiled.
#[derive(Debug)]
pub struct CompiledPipeline {
    /// The topic.
    pub topic: TopicPattern,
    /// Selects the Gateways.
    pub selector: Selector,
    /// The desired table.
    pub desired: Desired,
    /// The decoder; or the error of its FileDescriptorSet, which is corrected in its ConfigMap, not in the spec.
    pub decoder: Result<Decoder, Cause>,
}

/// Compiles a spec. `descriptor` is the FileDescriptorSet of the format Protobuf, or why it is not available.
///
/// # Errors
/// `InvalidSpec`: only a change of the spec corrects it.
pub fn compile(owner: Owner, spec: &PipelineSpec, descriptor: Result<Option<&[u8]>, Cause>) -> Result<CompiledPipeline, Cause> {
    let invalid = |message: String| Cause::new(Reason::InvalidSpec, message);
    let topic = TopicPattern::compile(&spec.source.topic, spec.decode.format).map_err(|error| invalid(error.to_string()))?;
    let desired = desired(owner, spec, &topic).map_err(|error| invalid(error.to_string()))?;
    let selector = Selector::try_from(spec.source.gateway_selector.clone())
        .map_err(|error| invalid(format!("failed to read gatewaySelector: {error}")))?;
    let decoder = match descriptor.map(|descriptor| Decoder::compile(&spec.decode, descriptor)) {
        Ok(Ok(decoder)) => Ok(decoder),
        Ok(Err(error @ CompileError::Describe(_))) => Err(error.cause()),
        Ok(Err(error)) => return Err(error.cause()),
        Err(cause) => Err(cause),
    };
    Ok(CompiledPipeline { topic, selector, desired, decoder })
}
