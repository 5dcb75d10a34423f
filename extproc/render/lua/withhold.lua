-- The last filter before a provider's wire, behind the one that adds the credential: an error that repeats our key is
-- passed on without it. CREDENTIAL_HEADER and PREFIX_BYTES stand above this text, written there by render/clusters.
-- The key is known to this script's memory alone: it is in no configuration, and so in no dump of one.

local WITHHELD = "[withheld]"
local key = nil

function envoy_on_request(handle)
  local value = handle:headers():get(CREDENTIAL_HEADER)
  key = value and string.sub(value, PREFIX_BYTES + 1)
end

-- What passes with the provider's own body: other errors are answered in the gateway's words (lua/answer.lua), and not
-- read, for they may have no end.
local function passes(status)
  return status >= "400" and status < "500" and status ~= "401" and status ~= "403" and status ~= "408"
    and status ~= "429"
end

local function without_key(text)
  local out, from = {}, 1
  while true do
    local first, last = string.find(text, key, from, true)
    if first == nil then break end
    out[#out + 1] = string.sub(text, from, first - 1) .. WITHHELD
    from = last + 1
  end
  if from == 1 then return nil end
  return table.concat(out) .. string.sub(text, from)
end

function envoy_on_response(handle)
  local headers = handle:headers()
  if key == nil or key == "" or not passes(headers:get(":status")) then return end
  local repeating = {}
  for name, value in pairs(headers) do
    if string.find(value, key, 1, true) then repeating[#repeating + 1] = name end
  end
  for _, name in ipairs(repeating) do headers:remove(name) end
  local body = handle:body()
  if body == nil then return end
  local clean = without_key(body:getBytes(0, body:length()))
  if clean ~= nil then headers:replace("content-length", tostring(body:setBytes(clean))) end
end
