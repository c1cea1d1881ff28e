//! Constants as arrays, which the plans of one model share where they keep them as they are: tables of a Gather, say.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tract_core::internal::Tensor as Array;

use super::super::constant::Constant;
use super::tensors::to_array;
use crate::onnx::DataType;

/// Smaller constants are copied each time.
const LEAST: usize = 1 << 16;

/// Where the bytes of a constant lie, how many they are, and what they are.
type Place = (usize, usize, DataType, Vec<usize>);

/// Arrays by the constants that they were made of, whose bytes stay where they are meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Arrays(Mutex<HashMap<Place, (Bytes, Arc<Array>)>>);

impl Arrays {
    /// A constant as tract computes with it.
    ///
    /// # Errors
    /// As [`to_array`].
    pub fn get(&self, constant: &Constant) -> Result<Arc<Array>, String> {
        let Constant::Plain(tensor) = constant else { return to_array(constant).map(Arc::new) };
        let stays = tensor.proto().raw_data.is_some() || tensor.is_external();
        if !stays || tensor.byte_len() < LEAST {
            return to_array(constant).map(Arc::new);
        }
        let bytes = tensor.raw();
        let place = (bytes.as_ptr() as usize, bytes.len(), tensor.dtype(), tensor.dims());
        if let Some((_, array)) = self.lock().get(&place) {
            return Ok(array.clone());
        }
        let array = Arc::new(to_array(constant)?);
        self.lock().insert(place, (bytes, array.clone()));
        Ok(array)
    }

    /// Forgets what no plan holds.
    pub fn settle(&self) {
        self.lock().retain(|_, (_, array)| Arc::strong_count(array) > 1);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Place, (Bytes, Arc<Array>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
