-- One attempt, at the provider's cluster: its path, its number, and what came of it. Header changes of an earlier
-- attempt stay on the request, so everything is set anew. PROVIDER, BASE_PATH and CUT_BYTES stand above this text,
-- written there for each cluster by render/clusters.

local DECISION, ATTEMPTS = "extproc.decision", "extproc.attempts"

function envoy_on_request(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local decision = metadata:get(DECISION)
  if decision == nil or decision["path"] == nil then
    handle:respond({ [":status"] = "503" }, "")
    return
  end
  local made = metadata:get(ATTEMPTS)
  local number = (made and made["n"] or 0) + 1
  metadata:set(ATTEMPTS, "n", number)
  metadata:set(ATTEMPTS, "p" .. number, PROVIDER)
  handle:headers():replace(":path", BASE_PATH .. string.sub(decision["path"], CUT_BYTES + 1))
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local decision, made = metadata:get(DECISION), metadata:get(ATTEMPTS)
  if decision == nil or made == nil then return end
  local headers, number = handle:headers(), made["n"]
  local status = headers:get(":status")
  metadata:set(ATTEMPTS, "s" .. number, status)
  if status == "429" or status == "503" then
    local retry_after = headers:get("retry-after")
    if retry_after ~= nil then metadata:set(ATTEMPTS, "r" .. number, retry_after) end
  end
  -- The id that the ledger knows, not the provider's own. Envoy adds it only where the request still bears it.
  headers:replace("x-request-id", decision["request_id"])
  headers:replace("x-extproc-provider", PROVIDER)
  local model = decision["models"][number]
  if model ~= nil and model ~= "" then headers:replace("x-extproc-model", model) end
end
