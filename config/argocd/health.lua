-- The health of a Gateway, a Device or a Pipeline for Argo CD, from the conditions of the current generation.
-- Argo CD gives the object as `obj` and takes a table {status, message}. Installed by kustomization.yaml beside this file.

local function progressing(message)
  return {status = "Progressing", message = message}
end

if obj.metadata.deletionTimestamp ~= nil then
  return progressing("being deleted")
end
if obj.spec ~= nil and obj.spec.paused == true then
  return {status = "Suspended", message = "spec.paused is true"}
end

local generation = obj.metadata.generation or 0
local status = obj.status or {}
if (status.observedGeneration or -1) ~= generation then
  return progressing("the operator has not seen this generation yet")
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  -- Conditions of an older generation do not apply to the current one.
  if condition.observedGeneration == nil or condition.observedGeneration == generation then
    conditions[condition.type] = condition
  end
end

local function message(condition)
  local text = condition.message or ""
  if text == "" then text = condition.reason or condition.type end
  return text
end

local stalled, ready, reconciling = conditions.Stalled, conditions.Ready, conditions.Reconciling
if stalled ~= nil and stalled.status == "True" then
  return {status = "Degraded", message = message(stalled)}
end
if reconciling ~= nil and reconciling.status == "True" then
  return progressing(message(reconciling))
end
if ready ~= nil and ready.status == "True" then
  return {status = "Healthy", message = message(ready)}
end
if ready ~= nil then
  return progressing(message(ready))
end
return progressing("no Ready condition for this generation yet")
