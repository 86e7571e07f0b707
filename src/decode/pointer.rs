//! JSON pointers (RFC 6901), merged into a tree that is traversed together with the payload.

use super::CompileError;

/// Up to this many keys are searched linearly, which compares most of them by their length only; a binary search must compare texts at
/// each step.
const MAX_LINEAR: usize = 16;

/// A position in the payload: the fields that take the value there, and the positions below it that fields point to.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    /// The slots that the value here fills: usually one, more where fields share a pointer.
    pub slots: Vec<usize>,
    /// Whether a field takes the value here as JSON, of any type.
    pub is_json: bool,
    /// Sorted by name.
    children: Vec<(Box<str>, Node)>,
}

impl Node {
    /// Makes the value at `pointer` fill `slot`.
    pub fn insert(&mut self, pointer: &str, slot: usize, is_json: bool) -> Result<(), CompileError> {
        let mut node = self;
        for token in tokens(pointer)? {
            let position = match node.position(&token) {
                Ok(position) => position,
                Err(position) => {
                    node.children.insert(position, (token.into(), Self::default()));
                    position
                }
            };
            node = &mut node.children[position].1;
        }
        node.slots.push(slot);
        node.is_json |= is_json;
        Ok(())
    }

    /// The positions below this one, with their keys.
    pub fn children(&self) -> impl Iterator<Item = (&str, &Self)> {
        self.children.iter().map(|(key, node)| (&**key, node))
    }

    /// The position below this one under a key, if a field points there or below.
    pub fn child(&self, key: &str) -> Option<&Self> {
        if self.children.len() > MAX_LINEAR {
            return self.position(key).ok().map(|position| &self.children[position].1);
        }
        self.children.iter().find(|(name, _)| **name == *key).map(|(_, child)| child)
    }

    /// Whether no field points below this position.
    pub fn is_leaf(&self) -> bool {
        self.children.is_empty()
    }

    fn position(&self, key: &str) -> Result<usize, usize> {
        self.children.binary_search_by(|(name, _)| (**name).cmp(key))
    }
}

/// The keys of a pointer.
pub(super) fn tokens(pointer: &str) -> Result<Vec<String>, CompileError> {
    let Some(rest) = pointer.strip_prefix('/') else {
        return Err(CompileError::ReadPointer { pointer: pointer.to_owned() });
    };
    Ok(rest.split('/').map(|token| token.replace("~1", "/").replace("~0", "~")).collect())
}
