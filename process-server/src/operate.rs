//! Answering operators.

use std::sync::Arc;

use control::{OperatorRequest, ServerStatus};
use wire::{Operation, RefusalCode};

use crate::server::Server;

/// Serves one request.
pub(crate) async fn serve(server: &Arc<Server>, operation: Operation) {
    let address = operation.address().to_owned();
    match serde_json::from_str(operation.request()) {
        Ok(OperatorRequest::Status) => {
            let status = ServerStatus::ProcessServer(server.status());
            let replied = match serde_json::to_string(&status) {
                Ok(json) => operation.reply(&json).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = replied {
                tracing::warn!(address, error, "answer an operator");
            }
        }
        Ok(_) => {
            operation.refuse(
                RefusalCode::BadRequest,
                "recovery points are at the target servers; a process server has none and cannot read them",
            );
        }
        Err(error) => {
            operation.refuse(RefusalCode::BadRequest, &format!("read the request: {error}"));
        }
    }
}
