"""/v1/responses: conversations as items, kept here and gone on with by `previous_response_id`."""
