-- The way back, at the listener: failures of providers become one clear answer, and a usage event that the client did
-- not ask for is taken out of its stream. Runs on every response and touches none that has nothing to mend.

local DECISION, ATTEMPTS, USAGE = "extproc.decision", "extproc.attempts", "extproc.usage"
-- A usage event is a few hundred bytes. What is longer than this and still undecided is let through.
local LONGEST_HELD = 65536

local ERRORS = {
  all_targets_failed = { status = "503", openai = "server_error", anthropic = "overloaded_error" },
  rate_limited = { status = "429", openai = "rate_limit_error", anthropic = "rate_limit_error" },
  provider_auth = { status = "502", openai = "server_error", anthropic = "api_error" },
  gateway_unavailable = { status = "503", openai = "server_error", anthropic = "api_error" },
}

local function quoted(text)
  local escaped = string.gsub(text, '[%c"\\]', function(char) return string.format("\\u%04x", string.byte(char)) end)
  return '"' .. escaped .. '"'
end

local function body_of(code, message, decision)
  local id = decision["request_id"] or ""
  local kind = ERRORS[code]
  if decision["dialect"] == "anthropic" then
    return '{"type":"error","error":{"type":' .. quoted(kind.anthropic) .. ',"message":' .. quoted(message)
      .. ',"code":' .. quoted(code) .. '},"request_id":' .. quoted(id) .. "}"
  end
  return '{"error":{"message":' .. quoted(message .. " (request id: " .. id .. ")") .. ',"type":' .. quoted(kind.openai)
    .. ',"param":null,"code":' .. quoted(code) .. "}}"
end

-- What the attempts came to: the code, the message, and how long to wait (seconds, or nil).
local function verdict(status, made)
  local count = made and made["n"] or 0
  if count == 0 then return "gateway_unavailable", "The gateway could not reach a provider.", nil end
  if status == "401" or status == "403" then
    return "provider_auth", "The provider " .. made["p" .. count] .. " refused the gateway's credential.", nil
  end
  local tried, limited, wait = {}, 0, nil
  for number = 1, count do
    local answer = made["s" .. number]
    tried[number] = made["p" .. number] .. " (" .. (answer or "no answer") .. ")"
    local retry_after = tonumber(made["r" .. number] or "")
    if retry_after and (wait == nil or retry_after < wait) then wait = retry_after end
    if answer == "429" then limited = limited + 1 end
  end
  local names = table.concat(tried, ", ")
  if limited == count then return "rate_limited", "Every provider is rate limited: " .. names .. ".", wait end
  return "all_targets_failed", "Every provider failed: " .. names .. ".", wait
end

local function is_failure(status)
  return status == "401" or status == "403" or status == "408" or status == "429" or status >= "500"
end

local function mend(handle, metadata, decision, status)
  local code, message, wait = verdict(status, metadata:get(ATTEMPTS))
  metadata:set(ATTEMPTS, "code", code)
  local headers = handle:headers()
  for _, name in ipairs({ "content-encoding", "retry-after", "www-authenticate", "etag", "x-extproc-model" }) do
    headers:remove(name)
  end
  headers:replace(":status", ERRORS[code].status)
  headers:replace("content-type", "application/json")
  if wait then headers:replace("retry-after", tostring(math.ceil(wait))) end
  handle:body(true):setBytes(body_of(code, message, decision))
end

-- Usage as the three kinds of streams tell it, in the order in which a later one replaces an earlier.
local INPUT = { "prompt_tokens", "input_tokens" }
local OUTPUT = { "completion_tokens", "output_tokens" }

local function first_number(event, names)
  for _, name in ipairs(names) do
    local number = tonumber(string.match(event, '"' .. name .. '"%s*:%s*(%d+)'))
    if number ~= nil then return number, name end
  end
  return nil
end

-- Many clients hang up at [DONE], before the stream's end, where Envoy's AI filter publishes. So what an event says of
-- usage is noted as it passes; `whole` marks the event after which nothing is to come but the end.
local function note_usage(handle, event)
  local metadata = handle:streamInfo():dynamicMetadata() -- one got before the last chunk is no longer valid
  local input, name = first_number(event, INPUT)
  local output = first_number(event, OUTPUT)
  if input == nil and output == nil then return end
  local cached = first_number(event, { "cached_tokens", "cache_read_input_tokens" })
  local written = first_number(event, { "cache_creation_input_tokens", "cache_write_tokens" })
  local is_anthropic = string.find(event, '"message_start"', 1, true) or string.find(event, '"message_delta"', 1, true)
  if input ~= nil then
    -- Anthropic counts cached and written tokens beside the input, the others within it.
    if is_anthropic then input = input + (cached or 0) + (written or 0) end
    metadata:set(USAGE, "input_tokens", input)
    metadata:set(USAGE, "cached_tokens", cached or 0)
    metadata:set(USAGE, "cache_write_tokens", written or 0)
  end
  if output ~= nil then metadata:set(USAGE, "output_tokens", output) end
  local reasoning = first_number(event, { "reasoning_tokens" })
  if reasoning ~= nil then metadata:set(USAGE, "reasoning_tokens", reasoning) end
  local model = string.match(event, '"model"%s*:%s*"([^"\\]*)"')
  if model ~= nil then metadata:set(USAGE, "model", model) end
  local starts = string.find(event, '"message_start"', 1, true) or string.find(event, '"response.created"', 1, true)
    or string.find(event, '"response.in_progress"', 1, true)
  if not starts then metadata:set(USAGE, "whole", true) end
end

local function tells_usage(text)
  return string.find(text, '"usage"%s*:%s*{') ~= nil
end

-- Whether an event is the usage event of an OpenAI stream: a usage object, and no choices.
local function is_usage_alone(event)
  return tells_usage(event) and string.find(event, '"choices"%s*:%s*%[%s*%]') ~= nil
end

-- Whether the beginning of an event already rules out that it is one.
local function is_other(held)
  local first = string.match(held, "data:%s*(%S)")
  if first ~= nil and first ~= "{" then return true end
  return string.find(held, '"choices"%s*:%s*%[%s*[^%]%s]') ~= nil or #held > LONGEST_HELD
end

-- Comment lines keep connections alive: they leave at once, alone, and do not decide the event they stand in.
local function without_comments(held, out)
  while true do
    local line = string.match(held, "^:[^\r\n]*\r?\n")
    if line == nil then return held end
    out[#out + 1] = line
    held = string.sub(held, #line + 1)
  end
end

-- The server-sent events of one response, cut by line ends of all three kinds (WHATWG HTML 9.2.5) across any chunking.
-- The function it gives takes a chunk and returns the bytes to pass on: all of them unless `hide`, and then only an event
-- that may yet be the usage event is held back.
local function new_filter(handle, hide)
  local held, passing, line_empty, after_cr = "", false, true, false

  local function close_event(part, out)
    if passing then
      out[#out + 1] = part
    else
      local event = held .. part
      if tells_usage(event) then note_usage(handle, event) end
      if not (hide and is_usage_alone(event)) then out[#out + 1] = event end
    end
    held, passing = "", false
  end

  return function(text)
    local size = #text
    if held == "" and not passing and line_empty and string.sub(text, -2) == "\n\n" and not tells_usage(text) then
      after_cr = false
      return text
    end
    local out, from, at = {}, 1, 1
    while true do
      local line_end = string.find(text, "[\r\n]", at)
      if line_end == nil then
        if at <= size then line_empty, after_cr = false, false end
        break
      end
      local is_cr = string.byte(text, line_end) == 13
      if not is_cr and after_cr and line_end == at then
        after_cr, at = false, at + 1
      else
        local blank = line_empty and line_end == at
        line_empty, after_cr, at = true, is_cr, line_end + 1
        if blank then
          if is_cr and string.byte(text, at) == 10 then after_cr, at = false, at + 1 end
          close_event(string.sub(text, from, at - 1), out)
          from = at
        end
      end
    end
    local rest = string.sub(text, from)
    if passing then
      out[#out + 1] = rest
    elseif rest ~= "" then
      held = without_comments(held .. rest, out)
      if is_other(held) then
        out[#out + 1] = held
        held, passing = "", true
      end
    end
    return table.concat(out)
  end
end

local function read_stream(handle, hide)
  local feed = new_filter(handle, hide)
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if size > 0 then
      local text = chunk:getBytes(0, size)
      local kept = feed(text)
      if hide and kept ~= text then chunk:setBytes(kept) end
    end
  end
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local decision = metadata:get(DECISION)
  if decision == nil or decision["path"] == nil then return end -- refused by decide: the answer is whole
  local headers = handle:headers()
  local status = headers:get(":status")
  if is_failure(status) then
    mend(handle, metadata, decision, status)
  elseif decision["stream"] and string.find(headers:get("content-type") or "", "text/event-stream", 1, true) then
    read_stream(handle, decision["hide_usage"] == true)
  end
end
